"""The commands and examples of all pages, for the tests that run them."""

import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token
from prefect.cli.run import load_json_key_values

from flows.settings import PROJECT

PATHS = [
    PROJECT / "README.md",
    PROJECT / "CONTRIBUTING.md",
    PROJECT / "SECURITY.md",
    *sorted(PROJECT.glob("docs/*.md")),
]
PAGES: dict[Path, list[Token]] = {
    path: MarkdownIt().enable("table").parse(path.read_text(encoding="utf-8")) for path in PATHS
}
NAME = re.compile(r"<!-- example: (\S+) -->\s*$")
# '…', "…", or a backslash and what follows
QUOTED = r"""'[^']*'|"(?:\\[\s\S]|[^"\\])*"|\\[\s\S]"""
# as a shell reads a line: what is quoted may go on in the next line
LINE = re.compile(rf"(?:{QUOTED}|[^\n])+\n?")
COMMENT = re.compile(r"(?<!\S)#.*")


@dataclass(frozen=True)
class Block:
    """A code block of a page; `<!-- example: NAME -->` on the line before it gives the name."""

    page: Path
    language: str
    name: str
    text: str


def blocks() -> list[Block]:
    """The code blocks of all pages."""
    found = []
    for page, tokens in PAGES.items():
        for before, token in itertools.pairwise([tokens[0], *tokens]):
            if token.type == "fence":
                name = "".join(NAME.findall(before.content))
                found.append(Block(page, token.info, name, token.content))
    return found


def inline_code() -> Iterator[str]:
    """What stands between backticks in the text of all pages."""
    for tokens in PAGES.values():
        for token in tokens:
            for part in token.children or []:
                if part.type == "code_inline":
                    yield part.content


def without_quotes(text: str) -> str:
    """A text of shell without all that is quoted in it."""
    unquoted = re.sub(QUOTED, "", text)
    assert not re.search("['\"]", unquoted), f"a quote without an end: {text}"
    return unquoted


def joined(line: str) -> str:
    """A command on one line."""
    return re.sub(r"\s*\\\n\s*", " ", line).strip()


def split(text: str) -> list[str]:
    """The commands in some lines of shell, each on one line."""
    without_quotes(text)
    return [joined(line) for line in LINE.findall(text) if line.strip()]


def sessions(text: str) -> list[tuple[str, list[str]]]:
    """The commands of a console block as they stand, each with the output that follows it.

    A line that starts with `$ ` is a command. Without such a line, all lines are commands.
    """
    parts = re.split(r"^\$ ", text, flags=re.MULTILINE)
    if len(parts) == 1:
        return [(line, []) for line in LINE.findall(text) if line.strip()]
    found = []
    for part in parts[1:]:
        line = next(LINE.finditer(part))[0]
        found.append((line, part[len(line) :].splitlines()))
    return found


def scripts() -> list[tuple[Path, str]]:
    """All shell of the pages, as it is pasted: commands of console blocks, and sh blocks."""
    found = []
    for block in blocks():
        if block.language == "console":
            found += [(block.page, command) for command, _ in sessions(block.text)]
        elif block.language == "sh":
            found.append((block.page, block.text))
    return found


def console() -> dict[str, list[str]]:
    """The commands in console blocks, each with the output that the page shows."""
    found: dict[str, list[str]] = {}
    for block in blocks():
        if block.language == "console":
            for command, output in sessions(block.text):
                if output or joined(command) not in found:
                    found[joined(command)] = output
    return found


def commands() -> list[str]:
    """All commands: those in console blocks, and each `make TARGET` in the text."""
    targets = [code for code in inline_code() if re.match("make [a-z]", code)]
    return [*console(), *targets]


def command(start: str) -> str:
    """The one command that is this, or starts like this."""
    found = {command for command in commands() if command.startswith(start)}
    if start in found:
        return start
    assert len(found) == 1, f"{len(found)} commands on the pages start with {start!r}: {found}"
    return found.pop()


def example(name: str) -> str:
    """The text of the code block of that name."""
    [text] = [block.text for block in blocks() if block.name == name]
    return text


def parameters(text: str) -> dict[str, Any]:
    """The parameters that a `prefect run` command gives to its run, read by Prefect's own code."""
    [command] = split(text)
    words = shlex.split(command)
    pairs = [value for option, value in itertools.pairwise(words) if option == "--param"]
    return load_json_key_values(pairs, "parameter")
