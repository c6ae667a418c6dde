"""The commands and examples of all pages, for the tests that run them."""

import re
import shlex
from typing import Any

from markdown_it import MarkdownIt
from prefect.cli.run import load_json_key_values

from flows.settings import PROJECT

PATHS = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted(PROJECT.glob("docs/*.md"))]
PAGES = {
    path: MarkdownIt().enable("table").parse(path.read_text(encoding="utf-8")) for path in PATHS
}
QUOTED = r"""'[^']*'|"(?:\\[\s\S]|[^"\\])*"|\\[\s\S]"""  # '…', "…", or a backslash and what follows
LINE = re.compile(
    rf"(?:{QUOTED}|[^\n])+\n?"
)  # as a shell reads it: what is quoted may go on to the next line


def blocks() -> list[tuple[str, str, str]]:
    """Language, name and text of each code block; `<!-- example: NAME -->` on the line before it gives the name."""
    pairs = [pair for tokens in PAGES.values() for pair in zip([tokens[0], *tokens], tokens)]
    name = re.compile(r"<!-- example: (\S+) -->\s*$")
    return [
        (it.info, "".join(name.findall(before.content)), it.content)
        for before, it in pairs
        if it.type == "fence"
    ]


def split(text: str) -> list[str]:
    """The commands in some lines of shell, without comments."""
    text = re.sub(rf"({QUOTED})|(?<!\S)#.*", lambda part: part[1] or "", text)
    assert not re.search("['\"]", re.sub(QUOTED, "", text)), f"a quote without an end: {text}"
    return [re.sub(r"\s*\\\n\s*", " ", line).strip() for line in LINE.findall(text) if line.strip()]


def console() -> dict[str, list[str]]:
    """The commands in console blocks; one that is written as `$ COMMAND` with the output that follows it."""
    found: dict[str, list[str]] = {}
    for text in [text for language, _, text in blocks() if language == "console"]:
        for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
            line = next(LINE.finditer(part))[0]
            found[split(line)[0]] = part[len(line) :].splitlines()
        if not text.startswith("$ "):
            found = {**{command: [] for command in split(text)}, **found}
    return found


def commands() -> list[str]:
    """All commands: those in console blocks, and each `make TARGET` in the text."""
    inline = [
        part for tokens in PAGES.values() for token in tokens for part in token.children or []
    ]
    return [
        *console(),
        *(
            p.content
            for p in inline
            if p.type == "code_inline" and re.match("make [a-z]", p.content)
        ),
    ]


def command(start: str) -> str:
    """The one command that is this, or starts like this."""
    found = {command for command in commands() if command.startswith(start)}
    assert start in found or len(found) == 1, (
        f"{len(found)} commands on the pages start with {start!r}: {found}"
    )
    return start if start in found else found.pop()


def example(name: str) -> str:
    """The text of the code block of that name."""
    [text] = [text for _, found, text in blocks() if found == name]
    return text


def parameters(text: str) -> dict[str, Any]:
    """What `prefect run` takes the lines of an example for, each of which is `--param NAME=VALUE`."""
    pairs = [shlex.split(line, comments=True)[1] for line in text.splitlines()]
    return load_json_key_values(pairs, "parameter")
