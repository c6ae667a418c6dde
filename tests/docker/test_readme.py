"""The session at the top of README.md, for real."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import docker

from flows.settings import PROJECT
from tests.support import readme


def alike(line: str) -> str:
    """The line without what varies from run to run."""
    line = re.sub(r"^\[\d.*?\]", "[…]", line)  # when it was
    line = re.sub(r"\b[0-9a-f]{12}\b", "(id)", line)
    line = re.sub(r"[\d.]+ s\b", "(seconds)", line)
    return re.sub(r"^make\[\d+\]", "make", line)  # as `make test` calls it


def test_it_looks_like_this(daemon: docker.DockerClient, tmp_path: Path) -> None:
    command, output = readme.session()
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=PROJECT,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},  # whose lock is free, while the tests hold the usual one
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 2
    said = map(alike, done.stdout.splitlines())
    shown = [line for line in output if not line.startswith("sidecar: ")]  # the daemon is there already
    for line in map(alike, shown):
        assert line in said, f"not there, or not in this order: {line}\n{done.stdout}"
