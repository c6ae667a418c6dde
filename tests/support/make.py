"""make, as a user runs it, with the Python of these tests."""

import os
import subprocess
import sys
from pathlib import Path

from flows.settings import PROJECT

PATH = os.environ["PATH"]  # as it was: some tests change it


def without_make() -> dict[str, str]:
    """The environment without what a make that runs the tests would tell another make."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    }


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run make in the project's folder; .venv is not made again, whatever has changed."""
    folder = Path(sys.executable).parent
    command = ["make", "--old-file=.venv/ready", f"BIN={folder}", *arguments]
    variables = {**without_make(), "PATH": PATH, **environment}
    return subprocess.run(command, cwd=PROJECT, env=variables, capture_output=True, text=True)
