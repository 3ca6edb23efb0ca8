"""The restart budget and the back-off."""

from __future__ import annotations

import pytest
from operator_builders import NOW, a_checkpoint

from pylon_api.job import FailureAction, FailurePolicy, FailureRecord, PylonJobStatus
from pylon_api.run import CheckpointReport
from pylon_operator.policies import restart


def status(
    spent: int,
    *steps: int | None,
    checkpoint: CheckpointReport | None = None,
    at_restart: CheckpointReport | None = None,
) -> PylonJobStatus:
    return PylonJobStatus(
        restarts=spent,
        restarts_without_progress=spent,
        restart_checkpoint_attempt=at_restart.attempt if at_restart else 0,
        restart_checkpoint_step=at_restart.step if at_restart else 0,
        checkpoint=checkpoint,
        failures=[FailureRecord(attempt=n, reason="Internal", step=step, time=NOW) for n, step in enumerate(steps, 1)],
    )


@pytest.mark.parametrize(
    ("max_restarts", "spent", "steps", "reason"),
    [
        (5, 0, [70], None),
        (5, 4, [70] * 5, None),
        (5, 5, [70] * 6, "NoProgress"),
        (5, 5, [70] * 5 + [71], "RestartsExhausted"),
        (1, 1, [3, 70, 70], "NoProgress"),
        (2, 2, [3, 70, 70], "RestartsExhausted"),
        (0, 0, [70], "RestartsExhausted"),
        (2, 2, [None, 0, None], "NoProgress"),
        (20, 20, [70] * 10, "NoProgress"),
    ],
)
def test_budget(max_restarts: int, spent: int, steps: list[int | None], reason: str | None) -> None:
    assert restart.exhausted(status(spent, *steps), FailurePolicy(max_restarts=max_restarts)) == reason


@pytest.mark.parametrize(
    ("checkpoint", "at_restart", "left"),
    [
        (None, None, 3),
        (a_checkpoint(100), a_checkpoint(100), 3),
        (a_checkpoint(100), a_checkpoint(50), 0),
        (a_checkpoint(50), a_checkpoint(100), 3),
        pytest.param(a_checkpoint(60, attempt=2), a_checkpoint(100), 0, id="after going back to an older one"),
        pytest.param(a_checkpoint(100), a_checkpoint(60, attempt=2), 3, id="a report that comes late"),
    ],
)
def test_only_a_new_commit_is_progress(
    checkpoint: CheckpointReport | None, at_restart: CheckpointReport | None, left: int
) -> None:
    known = status(3, checkpoint=checkpoint, at_restart=at_restart)
    assert restart.forgive(known).restarts_without_progress == left


@pytest.mark.parametrize(
    ("action", "without_progress"), [(FailureAction.RESTART, 3), (FailureAction.RESTART_FREELY, 2)]
)
def test_free_restarts_do_not_count(action: FailureAction, without_progress: int) -> None:
    counted = restart.count(status(2, checkpoint=a_checkpoint(100, attempt=4), at_restart=a_checkpoint(50)), action)
    assert (counted.restarts, counted.restarts_without_progress) == (3, without_progress)
    assert (counted.restart_checkpoint_attempt, counted.restart_checkpoint_step) == (4, 100)


@pytest.mark.parametrize(
    ("base", "without_progress", "seconds"),
    [(10, 0, 10), (10, 1, 0), (10, 2, 10), (10, 3, 20), (10, 6, 160), (10, 11, 3600), (1, 9999, 3600), (0, 7, 0)],
)
def test_the_first_counted_restart_is_at_once_then_the_wait_doubles_up_to_an_hour(
    base: int, without_progress: int, seconds: int
) -> None:
    policy = FailurePolicy(backoff_seconds=base)
    assert restart.backoff_seconds(status(without_progress), policy) == seconds
