"""Schedules against their closed forms."""

from __future__ import annotations

import math

import pytest

from pylon_api.training import ScheduleKind, ScheduleSpec
from pylon_trainer.optim.schedule import learning_rate_ratio, total_steps


def schedule(kind: ScheduleKind = ScheduleKind.COSINE, **fields: object) -> ScheduleSpec:
    return ScheduleSpec.model_validate({"kind": kind, "steps": 100, "warmup_steps": 10, **fields})


@pytest.mark.parametrize("kind", ScheduleKind)
def test_warm_up_rises_linearly_to_the_peak(kind: ScheduleKind) -> None:
    ratios = [learning_rate_ratio(schedule(kind), step, 100) for step in range(10)]
    assert ratios == pytest.approx([(step + 1) / 10 for step in range(10)])


@pytest.mark.parametrize("kind", ScheduleKind)
def test_no_warm_up_begins_near_the_peak(kind: ScheduleKind) -> None:
    assert learning_rate_ratio(schedule(kind, warmup_steps=0), 0, 100) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("step", [10, 40, 54, 70, 99])
def test_cosine_falls_to_the_minimum(step: int) -> None:
    expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 9) / 90))
    assert learning_rate_ratio(schedule(), step, 100) == pytest.approx(expected)


def test_cosine_ends_at_the_minimum() -> None:
    assert learning_rate_ratio(schedule(minimum_learning_rate_ratio=0.25), 99, 100) == pytest.approx(0.25)


@pytest.mark.parametrize(("step", "ratio"), [(10, 1.0), (79, 1.0), (80, 1 - 0.9 / 20), (89, 0.55), (99, 0.1)])
def test_warmup_stable_decay_is_flat_and_then_a_line(step: int, ratio: float) -> None:
    assert learning_rate_ratio(schedule(ScheduleKind.WARMUP_STABLE_DECAY), step, 100) == pytest.approx(ratio)


@pytest.mark.parametrize("fields", [{"decay_fraction": 0}, {"decay_fraction": 1}])
def test_warmup_stable_decay_at_its_extremes(fields: dict[str, float]) -> None:
    ratios = [
        learning_rate_ratio(schedule(ScheduleKind.WARMUP_STABLE_DECAY, **fields), step, 100) for step in range(100)
    ]
    assert max(ratios) == pytest.approx(1)
    assert ratios[-1] == pytest.approx(1 if fields["decay_fraction"] == 0 else 0.1)


def test_constant_stays() -> None:
    assert {learning_rate_ratio(schedule(ScheduleKind.CONSTANT), step, 100) for step in range(10, 100)} == {1.0}


@pytest.mark.parametrize("kind", ScheduleKind)
def test_a_warm_up_longer_than_the_run_never_ends(kind: ScheduleKind) -> None:
    ratios = [learning_rate_ratio(schedule(kind, warmup_steps=1000), step, 4) for step in range(4)]
    assert ratios == pytest.approx([0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (1024, 1), (1025, 2), (10_240, 10)])
def test_tokens_round_up_to_whole_steps(tokens: int, steps: int) -> None:
    assert total_steps(ScheduleSpec(tokens=tokens), tokens_per_step=1024) == steps
