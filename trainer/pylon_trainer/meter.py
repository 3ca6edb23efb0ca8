"""What happened since the last log line: losses, tokens, time, bytes. Sums stay on the device until they are read."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from pylon_api.run import DifficultyReport
from pylon_trainer.gating import difficulty
from pylon_trainer.run import Update
from pylon_trainer.runtime.distributed import World


@dataclass(frozen=True, slots=True)
class Reading:
    """One log interval over all ranks."""

    loss: float | None
    """Mean over tokens, nats; None when no step of the interval had a finite loss."""
    tokens_per_second: float
    step_seconds: float
    """Mean, with the device's work."""
    bytes_per_step: int
    """Median."""
    bytes_per_step_peak: int
    """Most of any step since the process began."""
    gradient_norm: float
    learning_rate: float
    nonfinite_tokens: int
    """Tokens with a logit that was infinite or not a number."""
    difficulty: DifficultyReport | None
    """Since the process began; None when no token was scored."""


class Meter:
    """Collects one interval after the other."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._tally = torch.zeros(difficulty.SHAPE, dtype=torch.float64, device=world.device)
        self._peak_bytes = 0
        self._last_bytes = world.traffic.bytes
        self.training_seconds = 0.0
        """Since training began, without pauses."""
        self._reset()

    def _reset(self) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64, device=self._world.device)
        self._seconds = 0.0
        self._steps = 0
        self._step_bytes: list[int] = []
        self._last_time = time.perf_counter()

    def add(self, update: Update) -> None:
        """Count one step. Never waits for the device."""
        for result in update.results:
            loss_sum = result.loss_sum.double()
            is_finite = torch.isfinite(loss_sum)
            finite_tokens = result.tokens * is_finite
            finite_loss_sum = torch.nan_to_num(loss_sum) * is_finite
            self._sums += torch.stack([finite_loss_sum, finite_tokens, result.tokens, result.nonfinite_rows])
            if result.difficulty is not None:
                self._tally += result.difficulty
        self._update = update
        self._steps += 1
        self._count_time()
        self._step_bytes.append(self._world.traffic.bytes - self._last_bytes)
        self._last_bytes = self._world.traffic.bytes

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time and bytes in here are no step's: an evaluation. Waits for the device first, whose lag counts towards the
        steps before."""
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)
        self._count_time()
        before_bytes = self._world.traffic.bytes
        yield
        self._last_time = time.perf_counter()
        self._last_bytes += self._world.traffic.bytes - before_bytes

    def read(self) -> Reading:
        """Close the interval. Collective; waits for the device, whose lag counts too."""
        # One collective and one copy for both; this rank's own tally goes on.
        totals = self._world.sum(torch.cat([self._sums, self._tally.flatten()])).cpu()
        loss_sum, finite_tokens, tokens, nonfinite_tokens = totals[:4].tolist()
        tally = totals[4:].reshape(difficulty.SHAPE)
        gradient_norm = float(self._update.gradient_norm)
        self._peak_bytes = max(self._peak_bytes, *self._step_bytes)
        self._count_time()
        reading = Reading(
            loss=loss_sum / finite_tokens if finite_tokens else None,
            tokens_per_second=tokens / self._seconds,
            step_seconds=self._seconds / self._steps,
            bytes_per_step=int(statistics.median(self._step_bytes)),
            bytes_per_step_peak=self._peak_bytes,
            gradient_norm=gradient_norm,
            learning_rate=self._update.learning_rate,
            nonfinite_tokens=int(nonfinite_tokens),
            difficulty=difficulty.describe(tally.tolist()) if tally.any() else None,
        )
        self._reset()
        return reading

    def _count_time(self) -> None:
        now = time.perf_counter()
        self._seconds += now - self._last_time
        self.training_seconds += now - self._last_time
        self._last_time = now
