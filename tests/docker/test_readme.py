"""The pages' sessions with `$ make run …`, for real."""

from __future__ import annotations

import re
import subprocess

import docker
import pytest

from flows.settings import PROJECT
from tests.support import pages


def alike(line: str) -> str:
    """The line without what varies from run to run."""
    line = re.sub(r"^\[\d.*?\]", "[…]", line)  # when it was
    line = re.sub(r"\b[0-9a-f]{12}\b", "(id)", line)
    line = re.sub(r"\b[\d.]+ (s|MB)\b", r"(number) \1", line)
    line = re.sub(r"^.* (Image is up to date|Downloaded newer image) for (\S+).*", r"pulled \2", line)
    return re.sub(r"^make(\[\d+\])?: \*\*\* \[\S+: ", "make: ", line)  # as `make test` calls it


def shown(lines: list[str]) -> list[str]:
    """What the page has to say: not whether Docker and images were there already."""
    return [alike(line) for line in lines if not line.startswith(("engine: ", "setup: "))]


SESSIONS = [(command, output) for command, output in pages.console().items() if output and "make run" in command]


@pytest.mark.parametrize(("command", "output"), SESSIONS)
def test_it_looks_like_this(daemon: docker.DockerClient, command: str, output: list[str]) -> None:
    done = subprocess.run(
        ["bash", "-c", command], cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == (2 if output[-1].startswith("make: ") else 0), done.stdout
    said = iter(shown(done.stdout.splitlines()))
    for line in shown(output):
        assert line in said, f"not there, or not in this order: {line}\n{done.stdout}"
