"""spec.suspend: save first, then stop. Decides only whether to ask, to wait or to stop."""

from __future__ import annotations

import enum
from datetime import datetime, timedelta

from pylon_api.job import PylonJobSpec, PylonJobStatus
from pylon_api.run import TrainerPhase, TrainerStatus

SILENCE = timedelta(seconds=30)
"""A trainer that does not answer for so long will not save either."""


class Move(enum.Enum):
    ASK = "ask for a checkpoint"
    WAIT = "wait for its commit"
    STOP = "stop: saved, or nothing to save"
    STOP_UNSAVED = "stop: the commit did not come"


def next_move(spec: PylonJobSpec, status: PylonJobStatus, trainer: TrainerStatus | None, now: datetime) -> Move:
    """What comes next for an attempt whose pods run although the job should be suspended.

    `trainer` is None while rank 0 does not answer; an operator that has just started has not asked it yet.
    """
    if not _saves(spec) or (trainer and trainer.phase in (TrainerPhase.STARTING, TrainerPhase.RESTORING)):
        return Move.STOP
    if status.suspend_requested_time is None:
        return Move.ASK
    if _committed(status, trainer):
        return Move.STOP
    waited = now - status.suspend_requested_time
    if remaining_seconds(spec, status, now) <= 0 or (trainer is None and waited >= SILENCE):
        return Move.STOP_UNSAVED
    return Move.WAIT


def _saves(spec: PylonJobSpec) -> bool:
    """Whether a suspend saves first."""
    return spec.training.checkpoint is not None and spec.checkpoint_timeout_seconds > 0


def step_to_save(status: PylonJobStatus, trainer: TrainerStatus | None) -> int:
    """The least step of the current attempt whose commit answers a request made now: the trainer's own, else any newer
    than its last."""
    if trainer:
        return trainer.step
    checkpoint = status.checkpoint
    return checkpoint.step + 1 if checkpoint and checkpoint.attempt == status.attempt else 0


def remaining_seconds(spec: PylonJobSpec, status: PylonJobStatus, now: datetime) -> float:
    """Seconds that the commit which was asked for may still take."""
    asked = status.suspend_requested_time or now
    return (asked + timedelta(seconds=spec.checkpoint_timeout_seconds) - now).total_seconds()


def _committed(status: PylonJobStatus, trainer: TrainerStatus | None) -> bool:
    if status.checkpoint is None or status.suspend_step is None:
        return False
    pending = trainer.checkpoint_requested_step if trainer else None
    return status.checkpoint.recency >= (status.attempt, max(status.suspend_step, pending or 0))
