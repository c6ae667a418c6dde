"""All pages: make has the targets, examples can be parsed, and links lead somewhere. Other tests run the examples."""

import itertools
import json
import re
import shlex
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest
import toml
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from flows.parameters import validate_parameters
from flows.settings import PROJECT
from tests.support import pages

LINKED = [
    *pages.PAGES,
    PROJECT / "CHANGELOG.md",
    *PROJECT.glob("deploy/*.md"),
    *PROJECT.glob("scripts/**/*.md"),
    *PROJECT.glob("tests/**/*.md"),
]
PARSERS: dict[str, Callable[[str], object]] = {
    "json": json.loads,
    "python": lambda text: compile(text, "example", "exec"),
    "sh": lambda text: subprocess.run(["bash", "-n"], input=text, text=True, check=True),
    "toml": toml.loads,
    "yaml": lambda text: list(yaml.safe_load_all(text)),
}


@pytest.mark.parametrize(
    "command", sorted({command for command in pages.commands() if command.startswith("make ")})
)
def test_make_has_the_target(command: str) -> None:
    done = subprocess.run(
        [*shlex.split(command), "--dry-run"], cwd=PROJECT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("language", "name", "text"), pages.blocks())
def test_code_is_valid(language: str, name: str, text: str) -> None:
    assert language in {*PARSERS, "console", "dockerfile", "mermaid", "text"}, (
        "the tests know no such language"
    )
    PARSERS.get(language, str)(text)


def test_a_run_may_have_the_parameters_for_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "of the flow's container")
    assert validate_parameters(pages.parameters(pages.example("s3-parameters"))) is None


@cache
def parsed(page: Path) -> list[Token]:
    return MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8"))


def anchors(page: Path) -> list[str]:
    """The anchors that GitHub gives the headings of a page: the second `Usage` is `usage-1`."""
    slugs: list[str] = []
    found = []
    for before, heading in itertools.pairwise(parsed(page)):
        if before.type == "heading_open":
            text = "".join(part.content for part in heading.children or [])
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.append(f"{slug}-{slugs.count(slug)}" if slug in slugs else slug)
            slugs.append(slug)
    return found


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(PROJECT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    inline = [part for token in parsed(page) for part in token.children or []]
    links = [
        str(value)
        for part in inline
        for name, value in part.attrs.items()
        if name in ("href", "src")
    ]
    for link in links:
        path, _, anchor = unquote(link).partition("#")
        if re.match(r"\w+:", path):
            continue  # not of this project
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(PROJECT), link
        assert target.exists(), link
        assert not anchor or target.suffix != ".md" or anchor in anchors(target), (
            f"{link}: {anchors(target)}"
        )


def test_the_readme_is_short() -> None:
    assert len((PROJECT / "README.md").read_text(encoding="utf-8").split()) <= 1000
