"""Waiting for what other processes do, in place of sleeping for a while and hoping."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

POLL_SECONDS = 0.1
T = TypeVar("T")


def wait_for(condition: Callable[[], T], timeout_seconds: float = 30.0, message: str = "the condition") -> T:
    """Waits until `condition()` is true and gives its value; `AssertionError` with the last one when late."""
    deadline = time.monotonic() + timeout_seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"after {timeout_seconds:.0f} s still not: {message}; last value: {value!r}")
        time.sleep(POLL_SECONDS)
    return value
