"""The benchmark of recovery: which status counts as the next step."""

from __future__ import annotations

import os
import signal
from typing import Any, cast

import pytest
import recovery


def a_status(attempt: int, step: int, committed: int) -> dict[str, Any]:
    return {"attempt": attempt, "training": {"step": step}, "checkpoint": {"step": committed}}


class FakeRun:
    def worker(self) -> int:
        return 4321


def test_only_a_step_beyond_the_checkpoint_ends_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append((pid, number)))
    statuses = [
        a_status(1, 90, 80),
        a_status(1, 100, 100),  # committed, but nothing to lose yet
        a_status(1, 104, 100),
        a_status(2, 104, 100),  # still what the dead one said
        a_status(2, 100, 100),  # restored
        a_status(2, 101, 100),
        a_status(2, 130, 120),
    ]
    rest = iter(statuses)
    row = recovery.seconds_to_next_step(cast(recovery.PylonRun, FakeRun()), rest)
    assert killed == [(4321, signal.SIGKILL)]
    assert (row["killed_at_step"], row["restored_step"], row["lost_steps"]) == (104, 100, 4)
    assert list(rest) == statuses[-1:]
