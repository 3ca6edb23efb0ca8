"""Rank 0 knows by its clock when a checkpoint is due; no time passes here but what the test says."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from pylon_api.run import RunConfig
from pylon_trainer.checkpoint.pace import Pace
from pylon_trainer.checkpoint.policy import LEARNING_STEPS, Reach

MakeConfig = Callable[..., dict[str, Any]]
STEP_SECONDS = 2.0


class Life:
    """A run whose steps and checkpoints take what the test says."""

    def __init__(self, config: dict[str, Any], step: int = 0) -> None:
        run = RunConfig.model_validate(config)
        assert run.training.checkpoint is not None
        self.now = 1000.0
        self.training_seconds = 0.0
        self.step = step
        self.is_saving = False
        self.pace = Pace(run.training.checkpoint, run, lambda: self.now)
        self.pace.begin(step)

    def live(self, steps: int, cost_seconds: float = 0.0, write_seconds: float = 0.0) -> list[int]:
        """Steps that were saved, each at this cost and committed after this time, within the next step."""
        saved = []
        for _ in range(steps):
            reach = self.pace.due(self.step + 1)
            seconds = STEP_SECONDS + (cost_seconds if self.is_saving else 0.0)
            self.step, self.now, self.training_seconds = (
                self.step + 1,
                self.now + seconds,
                self.training_seconds + seconds,
            )
            self.pace.step_ended(self.training_seconds, Reach.STORE if self.is_saving else Reach.NOWHERE)
            if self.is_saving:
                self.pace.save_ended(write_seconds)
            self.is_saving = reach is Reach.STORE
            if self.is_saving:
                self.pace.save_began(self.step)
                saved.append(self.step)
        return saved


def test_by_seconds(make_config: MakeConfig) -> None:
    life = Life(make_config(checkpoint={"intervalSteps": 0, "intervalSeconds": 20}))
    assert life.live(40) == [11, 22, 33]
    assert life.pace.interval_steps == 10


def test_by_cost(make_config: MakeConfig) -> None:
    """sqrt(2 * 0.5 s * 10 000 s) = 100 s, which is 50 steps; the second failure makes that sqrt(2) times shorter."""
    checkpoint = {"intervalSteps": 0, "intervalControl": "YoungDaly", "meanSecondsBetweenFailures": 10_000}
    first = Life(make_config(checkpoint=checkpoint))
    saved = first.live(200, cost_seconds=0.5)
    assert saved[0] == LEARNING_STEPS
    assert all(50 <= later - earlier <= 53 for earlier, later in itertools.pairwise(saved))
    assert len(saved) == 4
    failed = make_config(checkpoint=checkpoint) | {"failures": 1}
    second = Life(failed, step=600)
    assert second.live(LEARNING_STEPS, cost_seconds=0.5) == [600 + LEARNING_STEPS]
    second.live(1, cost_seconds=0.5)
    assert second.pace.interval_steps == pytest.approx(50 / 2**0.5, abs=1.5)


def test_what_was_asked_for_and_given_up_is_tried_again_ever_later_and_then_left_to_the_next_due(
    make_config: MakeConfig,
) -> None:
    life = Life(make_config())
    tries = []
    for second in range(600):
        life.now = 1000.0 + second
        if life.pace.may_answer:
            tries.append(second)
            life.pace.request_failed()
    assert tries == [0, 1, 11, 71]
    life.pace.save_ended(write_seconds=1.0)
    assert life.pace.may_answer


def test_no_interval_is_shorter_than_a_save_takes(make_config: MakeConfig) -> None:
    checkpoint = {"intervalSteps": 0, "intervalControl": "YoungDaly", "meanSecondsBetweenFailures": 1}
    life = Life(make_config(checkpoint=checkpoint))
    saved = life.live(120, cost_seconds=0.001, write_seconds=60.0)
    assert all(later - earlier >= 30 for earlier, later in itertools.pairwise(saved))
    assert len(saved) > 2
