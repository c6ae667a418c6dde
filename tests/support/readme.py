"""The commands of README.md, for the tests that run them."""

from __future__ import annotations

import re
import textwrap

from flows.settings import PROJECT

TEXT = (PROJECT / "README.md").read_text(encoding="utf-8")


def session() -> tuple[str, list[str]]:
    """The command of the session at the top, and what it prints."""
    [(command, output)] = re.findall(r"^```console\n\$ (.*)\n([^`]*)^```", TEXT, re.MULTILINE)
    return command, output.splitlines()


def commands() -> list[str]:
    """All other commands: the lines of console blocks, and each `make …` in the text."""
    found: list[str] = []
    for block in re.findall(r"^ *```console\n([^$].*?)^ *```", TEXT, re.MULTILINE | re.DOTALL):
        unfinished = ""
        for line in textwrap.dedent(block).splitlines():
            unfinished += re.sub(r"\s+# .*", "", line)  # a comment
            if unfinished.count("'") % 2 == 0 and not unfinished.endswith("\\"):
                found += [unfinished.replace("\\", "")] if unfinished else []
                unfinished = ""
        assert not unfinished, unfinished
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    return [*found, *re.findall("`(make [^`…]+)`", prose)]


def command(start: str) -> str:
    """The one command that starts like this."""
    found = {command for command in commands() if command.startswith(start)}
    assert len(found) == 1, f"{len(found)} commands in README.md start with {start!r}: {found}"
    return found.pop()
