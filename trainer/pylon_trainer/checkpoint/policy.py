"""When a checkpoint is due, and what happens when the one before it is still on its way. Pure: rank 0 asks, and tells
the others.

The interval that loses least time in all is sqrt(2 * C * M), with C what a checkpoint costs and M the time between
failures (Young 1974, A first order approximation to the optimum checkpoint interval; Daly 2006, A higher order estimate
of the optimum checkpoint interval, whose further terms vanish where C is far below M, as here). What counts as cost is
training time: the seconds by which the steps that a save overlaps are longer than others, its stall among them.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace

from pylon_api.training import CheckpointSpec, IntervalControl

LEARNING_STEPS = 10
"""Under YoungDaly the first checkpoint falls due after so many steps, to learn what one costs."""

WARM_UP_STEPS = 3
"""Quiet steps at the beginning that are no measure of one: they compile, record and allocate."""

REQUEST_PAUSES_SECONDS = (1.0, 10.0, 60.0)
"""Before a checkpoint that was asked for and given up is tried again; after the last of these the next due one answers
the request. The store was asked several times over before each was given up, so these are for what takes longer."""

_MEMORY = 100
"""Steps over which the length of a quiet step is averaged."""


class Reach(enum.IntEnum):
    """How far a checkpoint goes."""

    NOWHERE = 0
    NODES = 1
    """To the nodes' own disks."""
    STORE = 2
    """To the store, and to the nodes' own disks where there are some."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What steps and checkpoints were measured to take, in seconds of training time."""

    step_seconds: float | None = None
    """A step beside which nothing is saved."""
    save_seconds: float | None = None
    """What one checkpoint for the store adds to the steps that it overlaps; mean over those so far, the newer the
    weightier."""
    write_seconds: float = 0.0
    """From the beginning of the last checkpoint to its commit."""
    quiet_steps: int = 0
    excess_seconds: float = 0.0
    """What the checkpoint for the store that is under way has added so far."""

    def after_step(self, seconds: float, overlapped: Reach) -> Costs:
        """overlapped: how far the farthest checkpoint goes that was on its way meanwhile. One for the nodes alone is no
        part of what those for the store cost, and its steps are no measure of a quiet one either."""
        usual = self.step_seconds
        if overlapped is Reach.NODES:
            return self
        if overlapped is Reach.STORE:
            return replace(self, excess_seconds=self.excess_seconds + (0.0 if usual is None else seconds - usual))
        steps = self.quiet_steps + 1
        if steps <= WARM_UP_STEPS:
            return replace(self, quiet_steps=steps)
        mean = seconds if usual is None else usual + (seconds - usual) / min(steps - WARM_UP_STEPS, _MEMORY)
        return replace(self, step_seconds=mean, quiet_steps=steps)

    def after_save(self, write_seconds: float) -> Costs:
        """A checkpoint was committed in the store, so many seconds after it had begun."""
        cost = max(0.0, self.excess_seconds)
        mean = cost if self.save_seconds is None else (self.save_seconds + cost) / 2
        return replace(self, save_seconds=mean, write_seconds=write_seconds, excess_seconds=0.0)


def mean_seconds_between_failures(guess: float, run_seconds: float, failures: int) -> float:
    """Of the whole gang: the guess counts as one failure beside those that were seen."""
    return (guess + run_seconds) / (1 + failures)


def limit_seconds(spec: CheckpointSpec, costs: Costs, run_seconds: float, failures: int) -> float:
    """Longest time between two checkpoints; infinite where only steps count.

    run_seconds, failures: of the job so far, this attempt included.
    """
    limit = float(spec.interval_seconds) or math.inf
    if spec.interval_control is IntervalControl.FIXED or costs.save_seconds is None:
        return limit
    between = mean_seconds_between_failures(spec.mean_seconds_between_failures, run_seconds, failures)
    best = math.sqrt(2 * costs.save_seconds * between)
    return min(limit, max(best, costs.write_seconds))


def interval_steps(spec: CheckpointSpec, costs: Costs, limit: float) -> int | None:
    """Steps between two checkpoints by all limits together; None when there is no limit, or it is not known yet."""
    limits = [spec.interval_steps] if spec.interval_steps else []
    if math.isfinite(limit) and costs.step_seconds:
        limits.append(max(1, math.ceil(limit / costs.step_seconds)))
    return min(limits, default=None)


def reach_due(
    spec: CheckpointSpec, limit: float, *, step: int, steps_since: int, seconds_since: float, saves: int
) -> Reach:
    """How far the checkpoint at the end of this step must go.

    limit: what limit_seconds gave. steps_since, seconds_since: since the last one that went to the store began, or
    since training did. saves: how many of those this attempt has begun.
    """
    if spec.interval_control is IntervalControl.FIXED:
        is_due = spec.interval_steps > 0 and step % spec.interval_steps == 0
    else:
        is_learning = saves == 0 and steps_since >= LEARNING_STEPS
        is_due = is_learning or 0 < spec.interval_steps <= steps_since
    if is_due or seconds_since >= limit:
        return Reach.STORE
    local = spec.local
    return Reach.NODES if local and local.interval_steps and step % local.interval_steps == 0 else Reach.NOWHERE


def request_pause_seconds(failures: int) -> float:
    """How long after the last of so many failures a checkpoint that was asked for is tried again; infinite when it is
    not."""
    return (0.0, *REQUEST_PAUSES_SECONDS)[failures] if failures <= len(REQUEST_PAUSES_SECONDS) else math.inf


@dataclass(frozen=True, slots=True)
class Move:
    """What to do at the end of a step."""

    begins: Reach
    """How far the checkpoint goes that begins now."""
    waits: Reach
    """How far the one goes that has to wait."""


def next_move(due: Reach, waiting: Reach, *, is_urgent: bool, is_busy: bool) -> Move:
    """The rule when checkpoints come faster than they can be written: while there is no memory free on every rank, the
    one that is due waits, at most one does, and when it begins it holds the newest step.

    is_urgent: it was asked for, or is the last one. That one does not wait for a later step: training waits for it.
    """
    wanted = Reach.STORE if is_urgent else max(due, waiting)
    if is_busy and not is_urgent:
        return Move(begins=Reach.NOWHERE, waits=wanted)
    return Move(begins=wanted, waits=Reach.NOWHERE)
