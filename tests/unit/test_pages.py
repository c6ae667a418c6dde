"""All pages against the project: commands and examples are run by tests, and links lead somewhere."""

from __future__ import annotations

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

from flows.parameters import validate_parameters
from flows.settings import PROJECT
from tests.support import pages

# What neither `.ci/run` nor a test runs, and why.
TARGETS_BY_HAND = {
    "bench": "takes half an hour",
    "clean": "removes the .venv that the tests run in",
    "lint": "part of `make test`",
    "lock": "asks the package index for new versions",
    "test-kubernetes": "part of `make test`",
    "test-unit": "part of `make test`",
}
COMMANDS_BY_HAND = {  # by how they start
    "kubectl taint node": "would keep other tests' pods off the only node",
}

MAKE = [command for command in dict.fromkeys(pages.commands()) if command.startswith("make ")]
OTHERS = [command for command in pages.console() if not command.startswith(("make ", "export "))]
SOURCES = "".join(path.read_text(encoding="utf-8") for path in PROJECT.glob("tests/**/*.py"))
CLAIMED = {start for _, start in re.findall(r"\b(?:readme|command)\(\s*([\"'])(.+?)\1\s*[,)]", SOURCES)}
EXAMPLES = {name for _, name in re.findall(r"\bexample\(\s*([\"'])(.+?)\1\s*\)", SOURCES)}
LINKED = [*pages.PAGES, PROJECT / "CHANGELOG.md", *PROJECT.glob("scripts/**/*.md"), *PROJECT.glob("tests/**/*.md")]

PARSERS: dict[str, Callable[[str], object]] = {
    "json": json.loads,
    "python": lambda text: compile(text, "example", "exec"),
    "sh": lambda text: subprocess.run(["bash", "-n"], input=text, text=True, check=True),
    "toml": toml.loads,
    "yaml": lambda text: list(yaml.safe_load_all(text)),
}


def claimed(command: str) -> bool:
    """Whether a test runs a command: it calls `readme` with how the command starts."""
    return any(command.startswith(start) and pages.command(start) == command for start in CLAIMED)


@pytest.mark.parametrize("command", MAKE)
def test_ci_or_a_test_runs_the_target(command: str) -> None:
    done = subprocess.run([*shlex.split(command), "--dry-run"], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ci = re.sub("#.*", "", (PROJECT / ".ci" / "run").read_text(encoding="utf-8"))
    run = {word for line in re.findall(r"\bmake ([\w -]+)", "\n".join([ci, *CLAIMED])) for word in line.split()}
    targets = {word for word in shlex.split(command)[1:] if "=" not in word}
    assert targets <= {*run, *TARGETS_BY_HAND}, f"neither .ci/run nor a test runs {targets - run}"


@pytest.mark.parametrize("command", OTHERS)
def test_a_test_runs_the_command(command: str) -> None:
    assert claimed(command) or any(map(command.startswith, COMMANDS_BY_HAND)), CLAIMED


@pytest.mark.parametrize("start", sorted({*CLAIMED, *COMMANDS_BY_HAND}))
def test_a_command_that_is_run_is_on_a_page(start: str) -> None:
    assert pages.command(start)


def test_a_run_may_have_the_parameters_for_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "of the flow's container")
    assert validate_parameters(pages.parameters(pages.example("s3-parameters"))) is None


def test_examples_are_used_by_tests() -> None:
    names = [name for _, name, _ in pages.blocks() if name]
    assert len(names) == len(set(names))
    assert set(names) == EXAMPLES


@pytest.mark.parametrize(("language", "name", "text"), pages.blocks())
def test_code_is_valid(language: str, name: str, text: str) -> None:
    assert language in {*PARSERS, "console", "dockerfile", "mermaid", "text"}, "the tests know no such language"
    assert name or language not in ("dockerfile", "python", "sh"), "without a name no test can run it"
    PARSERS.get(language, str)(text)


@cache
def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page: the second `Usage` is `usage-1`."""
    found: dict[str, int] = {}
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    for before, heading in itertools.pairwise(tokens):
        if before.type == "heading_open":
            text = "".join(part.content for part in heading.children or [])
            name = slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            while name in found:
                found[slug] += 1
                name = f"{slug}-{found[slug]}"
            found[name] = 0
    return set(found)


def links(page: Path) -> list[str]:
    """Where the links and pictures of a page lead to."""
    tokens = MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8"))
    inline = [part for token in tokens for part in token.children or []]
    html = "".join(part.content for part in [*tokens, *inline] if part.type.startswith("html_"))
    targets = [str(value) for part in inline for name, value in part.attrs.items() if name in ("href", "src")]
    return [*targets, *re.findall(r'(?:href|src|srcset)="([^"]+)"', html)]


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(PROJECT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = unquote(link).partition("#")
        if re.match(r"\w+:", path):
            continue  # not of this project
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(PROJECT), link
        assert target.exists(), link
        assert not anchor or target.suffix != ".md" or anchor in anchors(target), f"{link}: {anchors(target)}"


@pytest.mark.parametrize("page", list(PROJECT.glob("docs/*.md")), ids=lambda page: page.name)
def test_pages_are_short(page: Path) -> None:
    assert len(page.read_text(encoding="utf-8").splitlines()) <= 250


def test_the_readme_is_short() -> None:
    assert len((PROJECT / "README.md").read_text(encoding="utf-8").split()) <= 1000
