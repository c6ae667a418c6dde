"""What the processes of one test session share: a name of their own, and what is set up once."""

import os
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

# Of this process: others may use the same engine and the same cluster.
SESSION = f"tests-{uuid.uuid4().hex[:8]}"
SESSION_LABELS = {"docker-sidecar-on-kubernetes": SESSION}
# Empty without workers, and in the process that starts them.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")


def set_up_before_workers(
    session: pytest.Session, set_up: Callable[[], AbstractContextManager[object]]
) -> None:
    """With `pytest -n`: set up what the workers share, in the process that starts them."""
    starts_workers = session.config.getoption("numprocesses", None) and not WORKER
    if starts_workers:
        context = set_up()
        context.__enter__()

        def clean_up() -> None:
            context.__exit__(None, None, None)

        session.config.add_cleanup(clean_up)
