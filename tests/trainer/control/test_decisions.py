"""What promises that were kept, or not, do to the limit of a step and to a port's gain."""

from __future__ import annotations

import json
import math

import pytest

from pylon_trainer.control.decisions import (
    CEILING_RATIO,
    FLOOR_RATIO,
    HELD_TURNS,
    LEAST_GAIN,
    MOST_GAIN,
    TARGET_RATIO,
    Belief,
    Promise,
    next_gain,
    next_limit,
)


@pytest.mark.parametrize(
    ("limit", "predicted", "seen", "ratio", "expected"),
    [
        (0.1, -0.5, -0.45, 0.02, 0.2),
        (0.2, -0.5, -0.45, 0.02, CEILING_RATIO),
        (0.1, -0.5, -0.25, 0.02, 0.1),
        (0.1, -0.5, -0.05, 0.02, 0.01),
        (0.1, -0.5, 3.0, 4.0, 0.05),
        (FLOOR_RATIO, -0.5, 3.0, 4.0, FLOOR_RATIO),
        (0.1, 0.2, 0.1, 0.02, 0.1),
        (0.1, -1e-6, 0.1, 0.02, 0.1),
        (0.1, -0.5, math.nan, 0.02, 0.1),
        (0.1, math.inf, -0.2, 0.02, 0.1),
    ],
    ids=[
        "kept: farther",
        "at most the ceiling",
        "half kept: as before",
        "not kept: half of what was moved",
        "worse: half of the limit, which had been reached",
        "at least the floor",
        "uphill says nothing",
        "too little to tell",
        "not a number",
        "infinite",
    ],
)
def test_steps_go_as_far_as_promises_hold(
    limit: float, predicted: float, seen: float, ratio: float, expected: float
) -> None:
    assert next_limit(limit, Promise(predicted, seen, loss=2.0), ratio) == pytest.approx(expected)


def test_a_gain_goes_from_1_to_the_share_that_ports_keep_and_ever_slower() -> None:
    gain, gains = 1.0, []
    for observations in range(60):
        gain = next_gain(gain, 0.5, observations, steps=256)
        gains.append(gain)
    assert gains == sorted(gains, reverse=True)
    assert gains[0] == pytest.approx(0.5 + 0.5 * 0.99**256)
    assert gain == pytest.approx(0.5, abs=0.01)
    late = next_gain(gain, 2.5, observations=10_000, steps=256)
    assert late - gain == pytest.approx(2 * (1 - 0.999**256), rel=0.01)


@pytest.mark.parametrize(("agreement", "bound"), [(-5.0, LEAST_GAIN), (1e9, MOST_GAIN)])
def test_a_gain_stays_within_its_bounds(agreement: float, bound: float) -> None:
    gain = 1.0
    for observations in range(100):
        gain = next_gain(gain, agreement, observations, steps=256)
        assert LEAST_GAIN <= gain <= MOST_GAIN
    assert gain == pytest.approx(bound, rel=0.01)


def test_advice_is_held_for_some_turns_when_a_port_does_not_do_as_its_gradient_says() -> None:
    believed = Belief(gains=(1.0, 1.0)).after_check(1, Promise(-0.1, -0.09, 2.0), step=128, turn_steps=32)
    assert (believed.is_healthy, believed.held_until, believed.checks, believed.wrong_signs) == (True, 0, 1, 0)
    believed = believed.after_check(1, Promise(-0.1, 0.3, 2.0), step=256, turn_steps=32)
    assert (believed.is_healthy, believed.checks, believed.wrong_signs) == (False, 2, 1)
    assert believed.held_until == 256 + HELD_TURNS * 32
    assert believed.gains[0] == 1.0
    assert believed.hold(300, 8).held_until == believed.held_until


def test_what_is_believed_survives_a_checkpoint() -> None:
    believed = Belief(gains=(1.0, 0.7), checks=3).after_step(Promise(-0.5, -0.4, 2.0), 0.02)
    assert believed.limit == 2 * TARGET_RATIO
    assert Belief.from_state(json.loads(json.dumps(believed.to_state()))) == believed
