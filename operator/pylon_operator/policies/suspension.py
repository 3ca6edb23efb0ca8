"""spec.suspend: save first, then stop. Decides only whether to ask, to wait or to stop."""

from __future__ import annotations

import enum
from datetime import datetime, timedelta

from pylon_api.job import PylonJobSpec, PylonJobStatus
from pylon_api.run import TrainerPhase, TrainerStatus


class Move(enum.Enum):
    ASK = "ask for a checkpoint"
    WAIT = "wait for its commit"
    STOP = "stop: saved, or nothing to save"
    STOP_UNSAVED = "stop: the commit did not come"


def next_move(spec: PylonJobSpec, status: PylonJobStatus, trainer: TrainerStatus | None, now: datetime) -> Move:
    """What comes next for an attempt that runs although the job should be suspended."""
    if status.suspend_requested_time is None:
        return Move.ASK if _worth_saving(spec, trainer) else Move.STOP
    if _committed(status, trainer):
        return Move.STOP
    if trainer is None or remaining_seconds(spec, status, now) <= 0:
        return Move.STOP_UNSAVED
    return Move.WAIT


def remaining_seconds(spec: PylonJobSpec, status: PylonJobStatus, now: datetime) -> float:
    """Seconds that the commit which was asked for may still take."""
    asked = status.suspend_requested_time or now
    return (asked + timedelta(seconds=spec.checkpoint_timeout_seconds) - now).total_seconds()


def _worth_saving(spec: PylonJobSpec, trainer: TrainerStatus | None) -> bool:
    configured = spec.training.checkpoint is not None and spec.checkpoint_timeout_seconds > 0
    starting = (TrainerPhase.STARTING, TrainerPhase.RESTORING)
    return configured and trainer is not None and trainer.phase not in starting


def _committed(status: PylonJobStatus, trainer: TrainerStatus | None) -> bool:
    if status.checkpoint is None or status.suspend_step is None:
        return False
    pending = trainer.checkpoint_requested_step if trainer else None
    return status.checkpoint.step >= max(status.suspend_step, pending or 0)
