"""What the other scripts share: names of what they make, and how they wait and fail."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import requests
from docker.errors import DockerException

from flows.settings import load_job_template

CACHE = Path(
    os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "docker-sidecar-on-kubernetes"
)
NAME = "docker-sidecar"
LABELS = {"docker-sidecar-on-kubernetes": "make"}  # of containers and networks started here
# as the flow, the flow's image and the Agent's manifest name it
PREFECT = tuple(f"prefecthq/prefect:1.4.1{python}" for python in ("", "-python3.10", "-python3.7"))
DAEMON = str(
    load_job_template("native_sidecar")["spec"]["template"]["spec"]["initContainers"][0]["image"]
)
REGISTRY_IMAGE = "registry:3"
ANSWER_SECONDS, START_SECONDS = 5, 60
UNREACHABLE = (DockerException, requests.RequestException)


class SetupError(RuntimeError):
    """The setup failed. The message says why, and what to do."""


def say(message: str) -> None:
    """Tell the user what is done, and how long it takes."""
    print(f"setup: {message}", flush=True)


def root_cause(error: BaseException) -> BaseException:
    """An error without what libraries wrap around it."""
    while inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = inner
    return error


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Wait for a condition. Raises SetupError after START_SECONDS."""
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise SetupError(f"not within {START_SECONDS} s: {what}")
        time.sleep(0.1)
