"""make, as a user runs it, with the Python of these tests."""

import os
import subprocess
import sys
from pathlib import Path

from flows.settings import PROJECT

PATH = os.environ["PATH"]  # as it was: some tests change it


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run make in the project's folder; .venv is not made again, whatever has changed."""
    folder = Path(sys.executable).parent
    command = ["make", "--old-file=.venv/ready", f"BIN={folder}", *arguments]
    # the tests may be started by a make, which would tell this one of its own options
    ours = {
        name: os.environ[name] for name in os.environ if not name.startswith(("MAKE", "MFLAGS"))
    }
    variables = {**ours, "PATH": PATH, **environment}
    return subprocess.run(command, cwd=PROJECT, env=variables, capture_output=True, text=True)
