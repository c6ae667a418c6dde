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
TESTS = "".join(path.read_text() for path in (PROJECT / "tests" / "kubernetes").glob("*.py"))


@pytest.mark.parametrize("command", [readme.session()[0], *dict.fromkeys(MAKE)])
def test_make_knows_it(command: str) -> None:
    """Those that CI does not call are run by hand: `make bench`, `make clean`."""
    done = subprocess.run([*shlex.split(command), "--dry-run"], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", OTHERS)
def test_a_test_on_the_cluster_runs_it(command: str) -> None:
    starts = set(re.findall(r'readme\(\s*"([^"]+)"', TESTS))
    assert len([start for start in starts if command.startswith(start)]) == 1, starts


def test_links() -> None:
    """Every file that the page shows or links to is there, and so is every heading."""
    for path, anchor in re.findall(r"\]\(([^)#:]*)(#[^)]*)?\)", readme.TEXT):
        text = (PROJECT / path).read_text() if path else readme.TEXT
        if anchor:
            headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            assert anchor in ["#" + heading.lower().replace(" ", "-") for heading in headings]
