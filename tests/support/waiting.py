"""Waiting for a condition, and saying what was seen when it does not come."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(
    condition: Callable[[], T],
    what: str,
    seen: Callable[[], object] = lambda: "",
    timeout: float = 30,
) -> T:
    """Wait until a condition holds, and return what it returned. After `timeout` seconds fail, with what is seen."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.1)
    raise AssertionError(f"not within {timeout:g} s: {what}. Seen:\n{seen()}")
