"""README.md against the Makefile and the tests: each of its commands is run by one of them."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest

from flows.settings import PROJECT
from tests.support import readme

MAKE = [command for command in readme.commands() if command.startswith("make ")]
OTHERS = [command for command in readme.commands() if not command.startswith(("make ", "export "))]
CI = re.sub("#.*", "", (PROJECT / ".ci" / "run").read_text())
BY_HAND = {"bench", "clean", "test-kubernetes"}  # the last is a part of `make test`
TESTS = "".join(path.read_text() for path in (PROJECT / "tests" / "kubernetes").glob("*.py"))
STARTS = set(re.findall(r'readme\(\s*"([^"]+)"', TESTS))


@pytest.mark.parametrize("command", [readme.session()[0], *dict.fromkeys(MAKE)])
def test_ci_or_a_test_runs_it_with_make(command: str) -> None:
    words = shlex.split(command)
    done = subprocess.run([*words, "--dry-run"], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for target in [word for word in words[1:] if "=" not in word]:
        in_ci = re.search(rf"\bmake\b.* {target}\b", CI)
        assert in_ci or target in BY_HAND or any(start.startswith(f"make {target}") for start in STARTS)


@pytest.mark.parametrize("command", OTHERS)
def test_a_test_on_the_cluster_runs_it(command: str) -> None:
    assert len([start for start in STARTS if command.startswith(start)]) == 1, STARTS


def test_links() -> None:
    """Every file that the page shows or links to is there, and so is every heading."""
    for path, anchor in re.findall(r"\]\(([^)#:]*)(#[^)]*)?\)", readme.TEXT):
        text = (PROJECT / path).read_text() if path else readme.TEXT
        if anchor:
            headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            assert anchor in ["#" + heading.lower().replace(" ", "-") for heading in headings]
