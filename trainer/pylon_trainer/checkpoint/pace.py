"""Rank 0's view of time: what steps and checkpoints took, and so when the next one is due. policy.py decides."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from pylon_api.run import RunConfig
from pylon_api.training import CheckpointSpec
from pylon_trainer.checkpoint.policy import (
    Costs,
    Reach,
    interval_steps,
    limit_seconds,
    reach_due,
    request_pause_seconds,
)


class Pace:
    """Of one attempt."""

    def __init__(self, spec: CheckpointSpec, config: RunConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._spec = spec
        self._failures = config.failures
        self._earlier_run_seconds = config.run_seconds
        self._clock = clock
        self._begin_time = self._save_time = clock()
        self._save_step = 0
        self._saves = 0
        self._training_seconds = 0.0
        self._costs = Costs()
        self._request_failures = 0
        self._request_failure_time = -math.inf

    def begin(self, step: int) -> None:
        """Training begins after this step."""
        self._save_time, self._save_step = self._clock(), step

    def due(self, step: int) -> Reach:
        """How far a checkpoint must go at the end of this step."""
        return reach_due(
            self._spec,
            self._limit_seconds(),
            step=step,
            steps_since=step - self._save_step,
            seconds_since=self._clock() - self._save_time,
            saves=self._saves,
        )

    def step_ended(self, training_seconds: float, overlapped: Reach) -> None:
        """training_seconds: since training began, without pauses. overlapped: how far the farthest checkpoint goes that
        was on its way in this step."""
        self._costs = self._costs.after_step(training_seconds - self._training_seconds, overlapped)
        self._training_seconds = training_seconds

    def save_began(self, step: int) -> None:
        """A checkpoint for the store."""
        self._save_time, self._save_step = self._clock(), step
        self._saves += 1

    def save_ended(self, write_seconds: float) -> None:
        """It was committed, so many seconds after it had begun."""
        self._costs = self._costs.after_save(write_seconds)
        self._request_failures = 0

    def request_failed(self) -> None:
        """A checkpoint that was to answer a request was given up."""
        self._request_failures += 1
        self._request_failure_time = self._clock()

    @property
    def may_answer(self) -> bool:
        """Whether a checkpoint that is asked for may begin."""
        pause_seconds = request_pause_seconds(self._request_failures)
        return self._clock() - self._request_failure_time >= pause_seconds

    @property
    def interval_steps(self) -> int | None:
        """Steps between checkpoints by all limits now in force."""
        return interval_steps(self._spec, self._costs, self._limit_seconds())

    def _limit_seconds(self) -> float:
        run_seconds = self._earlier_run_seconds + self._clock() - self._begin_time
        return limit_seconds(self._spec, self._costs, run_seconds, self._failures)
