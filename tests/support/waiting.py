"""Waiting for a condition, and saying what was seen when it does not come."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(condition: Callable[[], T], what: str, seen: Callable[[], object] = lambda: "", timeout: float = 30) -> T:
    """Wait until a condition holds.

    Args:
        condition: what is asked, again and again, until it is true.
        what: the condition in words.
        seen: what to show when time is up: phases, events, the end of a log.
        timeout: seconds.

    Returns:
        What the condition returned.
    """
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.1)
    raise AssertionError(f"not within {timeout:g} s: {what}. Seen:\n{seen()}")
