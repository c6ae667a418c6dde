"""Waiting for a condition, and saying what was seen when it does not come."""

import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def nothing() -> str:
    return ""


def wait_for(
    condition: Callable[[], Result],
    what: str,
    seen: Callable[[], object] = nothing,
    timeout: float = 30,
) -> Result:
    """Wait until a condition holds, and return what it returned.

    After `timeout` seconds the test fails, and says what is seen.
    """
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        result = condition()
        if result:
            return result
        time.sleep(0.1)
    raise AssertionError(f"not within {timeout:g} s: {what}. Seen:\n{seen()}")
