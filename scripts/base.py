"""What the other scripts share: names of what they make, and how they wait, fail and end."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import requests
from docker.errors import DockerException

CACHE = Path(
    os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "docker-sidecar-on-kubernetes"
)
NAME = "docker-sidecar"
LABELS = {"docker-sidecar-on-kubernetes": "make"}  # of containers and networks started here
PREFECT = (
    "prefecthq/prefect:1.4.1",  # the flow's default container
    "prefecthq/prefect:1.4.1-python3.10",  # what the flow's image is built from
    "prefecthq/prefect:1.4.1-python3.7",  # the Agent's manifest names it
)
DAEMON = "docker:29.9.0-dind"  # as in job_templates/
REGISTRY_IMAGE = "registry:3"
ANSWER_SECONDS = 5
START_SECONDS = 60
UNREACHABLE = (DockerException, requests.RequestException)


class SetupError(RuntimeError):
    """The setup failed. The message says why, and what to do."""


def say(message: str) -> None:
    """Tell the user what is done, and how long it takes."""
    print(f"setup: {message}", flush=True)


def root_cause(error: BaseException) -> BaseException:
    """An error without what libraries wrap around it."""
    while True:
        inner = error.__cause__
        if inner is None and not error.__suppress_context__:
            inner = error.__context__
        if inner is None:
            return error
        error = inner


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Wait for a condition. Raises SetupError after START_SECONDS."""
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise SetupError(f"not within {START_SECONDS} s: {what}")
        time.sleep(0.1)


def clean_up_on_signals() -> None:
    """Treat SIGTERM, and a terminal that is closed, like Ctrl-C, so that cleanup runs.

    The second SIGTERM is ignored: make sends one as well.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _interrupt)


def _interrupt(number: int, _: object) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
