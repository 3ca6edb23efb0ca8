"""What ratio follows from what was measured: tables over pure decisions."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from pylon_api.training import GatingSpec
from pylon_trainer.gating.ratio import (
    EXPIRY,
    LADDER,
    PLAIN,
    TRIAL,
    Belief,
    Control,
    Observation,
    fit_costs,
    rows_of,
    scheduled_ratio,
)

CONCENTRATED = {0.125: 0.45, 0.1875: 0.57, 0.25: 0.66, 0.3125: 0.75, 0.375: 0.83, 0.5: 0.93}
"""Share of the gradient norms that the top tokens hold, late in training; the hardest quarter held 0.56 to 0.63 when it
was measured, the hardest half 0.91 to 0.95."""
SPREAD = {0.125: 0.16, 0.1875: 0.23, 0.25: 0.31, 0.3125: 0.38, 0.375: 0.45, 0.5: 0.58}
"""Early in training."""


def masses(table: Mapping[float, float]) -> dict[float, float]:
    return {**{ratio: max(table[0.5], 0.3 + 0.7 * ratio) for ratio in LADDER if ratio > 0.5}, **table, PLAIN: 1.0}


def shares(scale: float) -> dict[float, float]:
    """A gated step is worth `scale` times its ratio in plain steps."""
    return {ratio: min(1.0, scale * ratio) for ratio in LADDER}


def seconds(*ratios: float, plain: float = 0.3, fixed: float = 1 / 3) -> dict[float, float]:
    """Of steps that cost `fixed` plain steps and the rest in proportion to the ratio."""
    return {ratio: plain * (fixed + (1 - fixed) * ratio) for ratio in (PLAIN, *ratios)}


def control_of(**gating: object) -> Control:
    return Control.of(GatingSpec.model_validate({"strategy": "GradientNorm", **gating}))


def settled(control: Control, observation: Observation, intervals: int = 40) -> Belief:
    belief = Belief.initial(control)
    for _ in range(intervals):
        belief = belief.after(observation, control)
    return belief


KNOWN = Observation(masses(CONCENTRATED), shares(2.4), seconds(0.5, 0.25))

CASES: list[tuple[str, dict[str, object], Observation, float, str]] = [
    ("concentrated mass", {}, KNOWN, 0.5, "hold 0.93"),
    ("a lower goal", {"target_mass": 0.65}, KNOWN, 0.25, "hold 0.66"),
    ("a floor", {"target_mass": 0.2, "minimum_token_ratio": 0.375}, KNOWN, 0.375, "hold 0.83"),
    ("a floor between the rungs", {"target_mass": 0.2, "minimum_token_ratio": 0.4}, KNOWN, 0.5, "hold 0.93"),
    ("spread mass", {}, Observation(masses(SPREAD), shares(1.1), seconds(0.5)), PLAIN, "below 0.9"),
    ("spread mass under a ceiling", {"maximum_token_ratio": 0.5, "fallback": "Never"},
     Observation(masses(SPREAD), shares(1.1)), 0.5, "hold 0.58"),
    ("a ceiling that does not pay", {"maximum_token_ratio": 0.5},
     Observation(masses(SPREAD), shares(1.1), seconds(0.5)), PLAIN, "worth 0.55 plain ones"),
    ("an engine that spares little", {},
     Observation(masses(CONCENTRATED), shares(1.2), seconds(0.5, fixed=0.9)), PLAIN, "worth 0.90 plain ones"),
    ("an engine that cuts gradients between tokens", {"engine": "SinglePass"},
     Observation(masses(CONCENTRATED), shares(1.6), seconds(0.5)), 0.625, "worth 0.90 plain steps in the time of 0.75"),
    ("and nobody asked", {"fallback": "Never"},
     Observation(masses(CONCENTRATED), shares(1.6), seconds(0.5, fixed=0.9)), 0.5, "hold 0.93"),
    ("a larger ratio pays where the smallest that holds does not", {"target_mass": 0.4},
     Observation(masses(CONCENTRATED), shares(2), seconds(0.5)), 0.3125, "worth 0.62 plain steps in the time of 0.54"),
    ("no gated step was timed yet", {}, Observation(masses(CONCENTRATED), shares(2), seconds()), 0.5, "measuring"),
    ("no plain step was timed yet", {}, Observation(masses(CONCENTRATED), shares(1.6)), PLAIN, "measuring"),
    ("no label was seen", {}, Observation({}, {}, seconds(0.5)), PLAIN, "no token"),
    ("no label was seen, and no fallback", {"fallback": "Never"}, Observation(), 0.5, "no token"),
    ("a fixed ratio", {"ratio_control": "Fixed", "token_ratio": 0.3}, KNOWN, 0.3, "Fixed at 0.3"),
]  # fmt: skip


@pytest.mark.parametrize(("gating", "observation", "ratio", "reason"), [case[1:] for case in CASES],
                         ids=[case[0] for case in CASES])  # fmt: skip
def test_ratio_and_reason(gating: dict[str, object], observation: Observation, ratio: float, reason: str) -> None:
    control = control_of(**gating)
    observation = Observation(
        {**observation.mass, **({0.4: 0.86} if observation.mass else {})},
        {**observation.share, **({0.4: 0.4} if observation.share else {})},
        observation.seconds,
    )
    belief = settled(control, observation)
    assert belief.ratio == ratio
    assert reason in belief.reason
    assert len(belief.reason) <= 200


def test_a_ratio_in_use_moves_one_rung_at_a_time() -> None:
    control = control_of(fallback="Never", target_mass=0.65)
    belief, ratios = Belief.initial(control), []
    for _ in range(6):
        belief = belief.after(KNOWN, control)
        ratios.append(belief.ratio)
        assert f"the top {belief.ratio:g} of tokens" in belief.reason
    assert ratios == [0.375, 0.3125, 0.25, 0.25, 0.25, 0.25]


def test_on_the_way_the_reason_speaks_of_the_ratio_that_is_taken() -> None:
    control = control_of(target_mass=0.65)
    belief = settled(control_of(), KNOWN).after(KNOWN, control)
    worth, costs = control.worth(belief, 0.375), fit_costs(belief.seconds)
    assert belief.ratio == 0.375
    assert f"the top 0.375 of tokens hold 0.83 of the gradient mass; worth {worth:.2f} plain" in belief.reason
    assert f"in the time of {costs(0.375):.2f}" in belief.reason


def test_noise_at_the_border_does_not_throw_the_ratio_to_and_fro() -> None:
    control = control_of(fallback="Never")
    belief = settled(control, Observation({**masses(CONCENTRATED), 0.5: 0.91}, shares(1.6)))
    for mass in (0.885, 0.91, 0.89, 0.905, 0.88):
        belief = belief.after(Observation({**masses(CONCENTRATED), 0.5: mass}, shares(1.6)), control)
        assert belief.ratio == 0.5
    for _ in range(10):
        belief = belief.after(Observation({**masses(CONCENTRATED), 0.5: 0.8}, shares(1.6)), control)
    assert belief.ratio > 0.5


def test_gating_begins_where_it_pays_well_and_ends_where_it_does_not_pay_at_all() -> None:
    def paying(gain: float) -> Observation:
        times = seconds(0.5)
        return Observation(masses(CONCENTRATED), {ratio: gain * (1 + 2 * ratio) / 3 for ratio in LADDER}, times)

    control = control_of()
    assert settled(control, paying(1.03)).ratio == PLAIN
    gated = settled(control, paying(1.2))
    assert gated.ratio == 0.5
    for gain, ratio in ((1.03, 0.5), (0.95, PLAIN)):
        belief = gated
        for _ in range(20):
            belief = belief.after(paying(gain), control)
        assert belief.ratio == ratio


def test_times_expire_and_are_measured_anew() -> None:
    control = control_of()
    belief = settled(control, KNOWN)
    gated_alone = Observation(KNOWN.mass, KNOWN.share, {0.5: KNOWN.seconds[0.5]})
    for _ in range(EXPIRY - 1):
        belief = belief.after(gated_alone, control)
        assert belief.ratio == 0.5
    belief = belief.after(gated_alone, control)
    assert belief.reason == "measuring the time of a plain step"
    assert belief.after(KNOWN, control).ratio == 0.5


def test_a_trial_of_gated_steps_is_short_and_comes_again_until_it_was_timed() -> None:
    control = control_of()
    untimed = Observation(KNOWN.mass, KNOWN.share, {PLAIN: KNOWN.seconds[PLAIN]})
    belief, tried = Belief.initial(control), []
    for _ in range(3 * TRIAL + 1):
        belief = belief.after(untimed, control)
        tried.append(belief.ratio < PLAIN)
    assert tried == [True, *[False] * (TRIAL - 1)] * 3 + [True]
    assert belief.after(KNOWN, control).ratio == 0.5


def test_cost_is_a_line_through_what_was_measured() -> None:
    costs = fit_costs({PLAIN: 0.2, 0.5: 0.14})
    assert costs(0.25) == pytest.approx(0.55)
    assert costs(PLAIN) == pytest.approx(1)
    assert fit_costs({PLAIN: 0.2, 0.75: 0.05})(0.125) > 0


def test_a_belief_survives_a_checkpoint_of_plain_values() -> None:
    control = control_of()
    belief = settled(control, KNOWN, 3)
    restored = Belief.from_state(json.loads(json.dumps(belief.to_state())))
    assert restored == belief
    assert restored.after(KNOWN, control) == belief.after(KNOWN, control)


@pytest.mark.parametrize(
    ("ratio", "tokens", "rows"),
    [(0.5, 16, 8), (0.3, 45, 14), (1e-9, 45, 1), (0.99, 45, 45), (0.25, 4096, 1024), (0.3, 16384, 4928), (1, 99, 99)],
)  # fmt: skip
def test_rows_are_whole_and_many_are_multiples_of_a_tile(ratio: float, tokens: int, rows: int) -> None:
    assert rows_of(ratio, tokens) == rows


def test_ratio_falls_over_warm_up_and_decay_in_few_steps() -> None:
    gating = GatingSpec(
        strategy="GradientNorm",
        ratio_control="Fixed",
        token_ratio=0.6,
        warmup_steps=100,
        final_token_ratio=0.2,
        decay_steps=200,
    )
    ratios = [scheduled_ratio(gating, step, gating.token_ratio) for step in range(400)]
    assert ratios[0] == PLAIN
    assert ratios[100] == 0.6
    assert ratios[99] == 0.625
    assert set(ratios[300:]) == {0.2}
    assert ratios == sorted(ratios, reverse=True)
    assert set(ratios) <= {*LADDER, 0.6, 0.2}


@pytest.mark.parametrize(("goal", "half_way"), [(0.5, 0.75), (0.25, 0.625), (PLAIN, PLAIN)])
def test_warm_up_falls_towards_what_the_closed_loop_wants(goal: float, half_way: float) -> None:
    gating = GatingSpec(strategy="GradientNorm", warmup_steps=100)
    assert scheduled_ratio(gating, 50, goal) == half_way
    assert scheduled_ratio(gating, 100, goal) == goal
