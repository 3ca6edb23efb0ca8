"""Ask, wait or stop."""

from __future__ import annotations

from typing import Any

import pytest
from operator_builders import NOW, a_checkpoint, a_job, a_trainer, ago

from pylon_api.job import PylonJobStatus
from pylon_api.run import TrainerPhase, TrainerStatus
from pylon_operator.policies.suspension import Move, next_move, step_to_save


@pytest.mark.parametrize(
    ("spec", "trainer", "move"),
    [
        ({}, a_trainer(), Move.ASK),
        ({}, None, Move.ASK),
        ({}, a_trainer(phase=TrainerPhase.STARTING), Move.STOP),
        ({}, a_trainer(phase=TrainerPhase.RESTORING), Move.STOP),
        ({"checkpoint_timeout_seconds": 0}, a_trainer(), Move.STOP),
        ({"training": {"checkpoint": None}}, a_trainer(), Move.STOP),
    ],
)
def test_asks_only_for_what_is_worth_saving(spec: dict[str, Any], trainer: TrainerStatus | None, move: Move) -> None:
    assert next_move(a_job(**spec).spec, PylonJobStatus(), trainer, NOW) is move


@pytest.mark.parametrize(
    ("committed", "trainer", "waited", "move"),
    [
        (None, a_trainer(step=45), 10, Move.WAIT),
        (30, a_trainer(step=45), 10, Move.WAIT),
        (40, a_trainer(step=45), 10, Move.STOP),
        (40, a_trainer(step=41, checkpoint_requested_step=42), 10, Move.WAIT),
        (42, a_trainer(step=45), 120, Move.STOP),
        (30, a_trainer(step=45), 119, Move.WAIT),
        (30, a_trainer(step=45), 120, Move.STOP_UNSAVED),
        (30, None, 29, Move.WAIT),
        (30, None, 30, Move.STOP_UNSAVED),
        (30, a_trainer(phase=TrainerPhase.RESTORING), 1, Move.STOP),
        (40, None, 1, Move.STOP),
    ],
)
def test_waits_for_the_commit_within_bounds(
    committed: int | None, trainer: TrainerStatus | None, waited: float, move: Move
) -> None:
    status = PylonJobStatus(
        attempt=1,
        suspend_requested_time=ago(waited),
        suspend_step=40,
        checkpoint=a_checkpoint(committed) if committed else None,
    )
    assert next_move(a_job(checkpoint_timeout_seconds=120).spec, status, trainer, NOW) is move


def test_a_higher_step_of_an_earlier_attempt_answers_nothing() -> None:
    """This attempt had to go back to an older checkpoint, because that one was damaged."""
    status = PylonJobStatus(attempt=2, suspend_requested_time=ago(10), suspend_step=60, checkpoint=a_checkpoint(100))
    trainer = a_trainer(attempt=2, step=60, checkpoint_requested_step=61)
    assert next_move(a_job().spec, status, trainer, NOW) is Move.WAIT
    assert step_to_save(status, None) == 0
    saved = status.model_copy(update={"checkpoint": a_checkpoint(61, attempt=2)})
    assert next_move(a_job().spec, saved, trainer, NOW) is Move.STOP


@pytest.mark.parametrize(
    ("trainer", "committed", "step"),
    [(a_trainer(step=45), 40, 45), (None, 40, 41), (None, None, 0)],
)
def test_what_is_asked_for_is_newer_than_what_is_saved(
    trainer: TrainerStatus | None, committed: int | None, step: int
) -> None:
    status = PylonJobStatus(attempt=1, checkpoint=a_checkpoint(committed) if committed else None)
    assert step_to_save(status, trainer) == step
