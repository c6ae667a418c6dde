"""Shell scripts of tests and of the pages, run as a user would."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from flows.settings import PROJECT


def shell(
    script: str,
    cwd: Path = PROJECT,
    stdin: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run a script with the programs of .venv, successfully, and return what it writes."""
    home_of_the_tests = os.environ.get("DOCKER_SIDECAR_TESTS", "")
    programs = Path(sys.executable).parent
    path = f"{home_of_the_tests}:{programs}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=cwd,
        env={**os.environ, "PATH": path, **(environment or {})},
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def replaced(text: str, instead: Mapping[str, str]) -> str:
    """A text with each of these words replaced."""
    for old, new in instead.items():
        text = text.replace(old, new)
    return text
