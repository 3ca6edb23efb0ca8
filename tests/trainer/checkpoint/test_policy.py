"""When a checkpoint is due: by steps, by seconds, by what it costs; and which one waits."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pylon_api.training import CheckpointSpec
from pylon_trainer.checkpoint.policy import (
    LEARNING_STEPS,
    Costs,
    Move,
    Reach,
    interval_steps,
    limit_seconds,
    next_move,
    reach_due,
)

NOWHERE, NODES, STORE = Reach.NOWHERE, Reach.NODES, Reach.STORE
YOUNG_DALY = {"intervalControl": "YoungDaly", "intervalSteps": 0, "meanSecondsBetweenFailures": 10_000}


def spec_of(**fields: Any) -> CheckpointSpec:
    return CheckpointSpec.model_validate({"uri": "./runs", **fields})


def due(spec: CheckpointSpec, *, limit: float = math.inf, step: int = 7, **since: Any) -> Reach:
    known = {"steps_since": 0, "seconds_since": 0.0, "saves": 1} | since
    return reach_due(spec, limit, step=step, **known)


@pytest.mark.parametrize(
    ("fields", "moment", "reach"),
    [
        ({"intervalSteps": 5}, {"step": 10}, STORE),
        ({"intervalSteps": 5}, {"step": 11, "steps_since": 9}, NOWHERE),
        ({"intervalSteps": 0}, {"step": 500, "steps_since": 500, "seconds_since": 9e9}, NOWHERE),
        ({"intervalSteps": 0, "intervalSeconds": 60}, {"limit": 60.0, "seconds_since": 59.9}, NOWHERE),
        ({"intervalSteps": 0, "intervalSeconds": 60}, {"limit": 60.0, "seconds_since": 60.0}, STORE),
        ({"intervalSteps": 5, "intervalSeconds": 60}, {"limit": 60.0, "step": 5}, STORE),
        (YOUNG_DALY, {"saves": 0, "steps_since": LEARNING_STEPS - 1}, NOWHERE),
        (YOUNG_DALY, {"saves": 0, "steps_since": LEARNING_STEPS}, STORE),
        (YOUNG_DALY, {"steps_since": 10_000, "seconds_since": 99.0, "limit": 100.0}, NOWHERE),
        (YOUNG_DALY | {"intervalSteps": 20}, {"step": 40, "steps_since": 19}, NOWHERE),
        (YOUNG_DALY | {"intervalSteps": 20}, {"step": 41, "steps_since": 20}, STORE),
        ({"intervalSteps": 6, "local": {"directory": "/d", "intervalSteps": 2}}, {"step": 4}, NODES),
        ({"intervalSteps": 6, "local": {"directory": "/d", "intervalSteps": 2}}, {"step": 6}, STORE),
        ({"intervalSteps": 6, "local": {"directory": "/d"}}, {"step": 4}, NOWHERE),
    ],
)
def test_what_is_due_at_a_moment(fields: dict[str, Any], moment: dict[str, Any], reach: Reach) -> None:
    assert due(spec_of(**fields), **moment) is reach


@pytest.mark.parametrize(
    ("fields", "costs", "run_seconds", "failures", "seconds"),
    [
        ({}, Costs(), 0, 0, math.inf),
        ({"intervalSeconds": 90}, Costs(save_seconds=1.0), 0, 0, 90),
        (YOUNG_DALY, Costs(), 0, 0, math.inf),
        (YOUNG_DALY, Costs(save_seconds=2.0), 0, 0, 200),
        (YOUNG_DALY, Costs(save_seconds=2.0), 30_000, 0, 400),
        (YOUNG_DALY, Costs(save_seconds=2.0), 30_000, 3, 200),
        (YOUNG_DALY, Costs(save_seconds=0.0, write_seconds=7.0), 0, 0, 7),
        (YOUNG_DALY, Costs(save_seconds=2.0, write_seconds=500.0), 0, 0, 500),
        (YOUNG_DALY | {"intervalSeconds": 50}, Costs(save_seconds=2.0), 0, 0, 50),
    ],
)
def test_the_limit_in_seconds(
    fields: dict[str, Any], costs: Costs, run_seconds: float, failures: int, seconds: float
) -> None:
    assert limit_seconds(spec_of(**fields), costs, run_seconds, failures) == pytest.approx(seconds)


@pytest.mark.parametrize("seconds", [5.0, 40.0, 81.0, 2500.0])
def test_no_other_interval_loses_less_time_than_youngs(seconds: float) -> None:
    """Lost per second with interval T: the share C / T that saving costs, and half an interval per failure."""
    cost, between = 1.0, 10_000.0

    def loss(interval: float) -> float:
        return cost / interval + interval / 2 / between

    best = limit_seconds(spec_of(**YOUNG_DALY), Costs(save_seconds=cost), 0, 0)
    assert loss(best) < loss(best + seconds)
    assert loss(best) < loss(best / (1 + seconds))


def test_a_checkpoint_costs_what_it_adds_to_the_steps_that_it_overlaps() -> None:
    costs = Costs()
    for seconds in (40.0, 5.0, 2.0, 1.0, 1.0, 1.0):  # the first ones compile
        costs = costs.after_step(seconds, NOWHERE)
    for seconds in (1.5, 1.25, 1.0):
        costs = costs.after_step(seconds, STORE)
    costs = costs.after_save(3.75)
    assert (costs.step_seconds, costs.save_seconds, costs.write_seconds) == (1.0, 0.75, 3.75)
    costs = costs.after_step(0.5, STORE).after_save(1.0)
    assert costs.save_seconds == 0.375, "a step that was shorter by chance costs nothing, and is no gain"


def test_a_checkpoint_for_the_nodes_alone_costs_those_for_the_store_nothing() -> None:
    costs = Costs()
    for seconds in (40.0, 5.0, 2.0, 1.0):
        costs = costs.after_step(seconds, NOWHERE)
    for seconds, overlapped in ((9.0, NODES), (1.5, STORE), (9.0, NODES)):
        costs = costs.after_step(seconds, overlapped)
    assert (costs.step_seconds, costs.after_save(2.0).save_seconds) == (1.0, 0.5)


def test_the_interval_in_force_is_the_shortest() -> None:
    costs = Costs(step_seconds=0.5)
    assert interval_steps(spec_of(intervalSteps=500), costs, math.inf) == 500
    assert interval_steps(spec_of(intervalSteps=500), costs, 60.0) == 120
    assert interval_steps(spec_of(intervalSteps=0), costs, 0.1) == 1
    assert interval_steps(spec_of(intervalSteps=0), Costs(), 60.0) is None
    assert interval_steps(spec_of(intervalSteps=0), costs, math.inf) is None


@pytest.mark.parametrize(
    ("due", "waiting", "is_urgent", "is_busy", "move"),
    [
        (NOWHERE, NOWHERE, False, False, Move(NOWHERE, NOWHERE)),
        (STORE, NOWHERE, False, False, Move(STORE, NOWHERE)),
        (STORE, NOWHERE, False, True, Move(NOWHERE, STORE)),
        (NOWHERE, STORE, False, True, Move(NOWHERE, STORE)),
        (NOWHERE, STORE, False, False, Move(STORE, NOWHERE)),
        (NODES, STORE, False, False, Move(STORE, NOWHERE)),
        (STORE, NODES, False, True, Move(NOWHERE, STORE)),
        (NOWHERE, NOWHERE, True, True, Move(STORE, NOWHERE)),
        (NODES, STORE, True, False, Move(STORE, NOWHERE)),
    ],
)
def test_at_most_one_waits_and_what_was_asked_for_never_does(
    due: Reach, waiting: Reach, is_urgent: bool, is_busy: bool, move: Move
) -> None:
    assert next_move(due, waiting, is_urgent=is_urgent, is_busy=is_busy) == move
