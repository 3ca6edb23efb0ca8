"""Ratio control: which share of the tokens shall carry gradient, and whether gating pays at all. Pure decisions.

A gated step of ratio r stands for `share` plain steps: sampling adds noise to the gradient, and with
inclusion probabilities p the noise of the sum of the tokens' gradients g is that of a batch smaller by
(sum g^2) / (sum g^2 / p), if the tokens' gradients point nowhere in common. An engine that cuts gradients between
tokens keeps the part `fidelity` of the direction, and the square of it of the progress. The step takes `cost` plain
steps' time. So a gated run learns share * fidelity^2 / cost times as fast as a plain one, and where that is not above 1
the step is plain. Among the ratios that pay the smallest is taken whose top tokens hold the target share of the
gradient norms: below it rare draws weigh more than the noise of this model tells.

The cost of a ratio is a straight line through what has been measured: a forward pass for all and a backward pass for
some. Measurements expire, so that a machine that changed is measured anew and one bad reading does not decide for ever.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pylon_api.training import GatingEngine, GatingFallback, GatingGranularity, GatingSpec, KvGradient, RatioControl

PLAIN = 1.0
"""The ratio of the plain step."""

LADDER = (PLAIN, 0.75, 0.625, 0.5, 0.375, 0.3125, 0.25, 0.1875, 0.125)
"""Ratios that a gate moves among, so that shapes are few and nothing recompiles after each of them was met."""

ROWS_MULTIPLE = 64
"""Numbers of rows from 16 times this on are rounded up to multiples of it, which fill tiles of matrix products."""

SMOOTHING = 0.25
"""Weight of a new observation in the running mean."""

MASS_SLACK = 0.01
GAIN_MARGIN = 0.05
"""The ratio in use may fall this far short of the target mass, and its gain needs only exceed 1, not 1 + margin; so
that noise does not throw the gate to and fro."""

CUT = {KvGradient.TRUNCATED: 0.36, KvGradient.DENSE: 0.24}
"""What cutting gradients between tokens takes from the cosine to the uncut gradient, by (1 - ratio)^2. Fits what
benchmarks/gate_bias.py measures at ratios from 0.25 to 0.75."""

EXPIRY = 256
"""Observations after which a measured time is forgotten."""

TRIAL = 3
"""Observations from a trial of gated steps until its times are known. The steps of all but the first are plain again,
because a trial that does not pay should cost little."""


@dataclass(frozen=True)
class Control:
    """What the spec asks of the ratio."""

    ratios: tuple[float, ...]
    """Ratios that a step may have, falling. Those of the ladder and those that the spec names."""
    allowed: tuple[float, ...]
    """Those among them that the closed loop may choose, falling; one for a fixed ratio."""
    start: float
    target_mass: float
    follows_mass: bool
    measures: bool
    """Whether plain steps are taken where gating would not pay."""
    cut: float = 0.0
    """As in CUT; 0 when the engine goes back over all tokens."""

    @classmethod
    def of(cls, gating: GatingSpec) -> Control:
        """From the spec."""
        follows = gating.ratio_control is RatioControl.GRADIENT_MASS
        lowest, highest = gating.minimum_token_ratio, gating.maximum_token_ratio
        start = min(max(gating.token_ratio, lowest), highest) if follows else gating.token_ratio
        allowed = {start, lowest, highest, *(r for r in LADDER if lowest <= r <= highest)} if follows else {start}
        return cls(
            ratios=tuple(sorted({*LADDER, *allowed, gating.final_token_ratio or start}, reverse=True)),
            allowed=tuple(sorted(allowed, reverse=True)),
            start=start,
            target_mass=gating.target_mass,
            follows_mass=follows,
            measures=follows and gating.fallback is GatingFallback.MEASURED,
            cut=CUT[gating.kv_gradient] if cuts_gradients(gating) else 0.0,
        )

    def worth(self, belief: Belief, ratio: float) -> float:
        """Plain steps that a gated one stands for."""
        fidelity = 1 - self.cut * (1 - ratio) ** 2
        return belief.share[ratio] * fidelity**2


@dataclass(frozen=True)
class Observation:
    """What an interval of steps showed, over all ranks."""

    mass: Mapping[float, float] = field(default_factory=dict)
    """By ratio: share of the gradient norms that the top tokens hold. Empty when no labelled token was seen."""
    share: Mapping[float, float] = field(default_factory=dict)
    """By ratio: plain steps that a gated one stands for, by the noise of its gradient."""
    seconds: Mapping[float, float] = field(default_factory=dict)
    """Of a step, by the ratio it had."""


@dataclass(frozen=True)
class Belief:
    """What is known, and what has been decided on it."""

    ratio: float
    """Of the steps from now on, warm-up apart; PLAIN for plain ones."""
    reason: str
    mass: Mapping[float, float] = field(default_factory=dict)
    share: Mapping[float, float] = field(default_factory=dict)
    seconds: Mapping[float, float] = field(default_factory=dict)
    ages: Mapping[float, int] = field(default_factory=dict)
    """Observations since a time was measured."""
    trial_wait: int = 0
    """Observations until the time that a trial of gated steps took must be known."""

    @classmethod
    def initial(cls, control: Control) -> Belief:
        """Before anything is known."""
        return _decided(cls(control.start, ""), control)

    def after(self, observation: Observation, control: Control) -> Belief:
        """What to believe and to do next."""
        seconds, ages = dict(self.seconds), {ratio: age + 1 for ratio, age in self.ages.items()}
        for ratio, measured_s in observation.seconds.items():
            seconds[ratio] = (seconds[ratio] + measured_s) / 2 if ratio in seconds else measured_s
            ages[ratio] = 0
        known = {ratio for ratio, age in ages.items() if age < EXPIRY}
        learnt = replace(
            self,
            mass=_smoothed(self.mass, observation.mass),
            share=_smoothed(self.share, observation.share),
            seconds={ratio: seconds[ratio] for ratio in known},
            ages={ratio: ages[ratio] for ratio in known},
            trial_wait=max(0, self.trial_wait - 1),
        )
        return _decided(learnt, control)

    def to_state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        tables = {name: _as_pairs(getattr(self, name)) for name in ("mass", "share", "seconds", "ages")}
        return {"ratio": self.ratio, "reason": self.reason, "trial_wait": self.trial_wait, **tables}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Belief:
        """What to_state gave."""
        tables = {name: dict(map(tuple, state[name])) for name in ("mass", "share", "seconds", "ages")}
        return cls(state["ratio"], state["reason"], **tables, trial_wait=state["trial_wait"])


def cuts_gradients(gating: GatingSpec) -> bool:
    """Whether tokens that are not chosen get no gradient through attention."""
    return gating.granularity is GatingGranularity.TOKEN and gating.engine is not GatingEngine.HEAD_ONLY


def rows_of(ratio: float, tokens: int) -> int:
    """Rows that a ratio of so many tokens stands for, at least one."""
    rows = math.ceil(ratio * tokens)
    if rows >= 16 * ROWS_MULTIPLE:
        rows = -(-rows // ROWS_MULTIPLE) * ROWS_MULTIPLE
    return min(rows, tokens)


def scheduled_ratio(gating: GatingSpec, step: int, goal: float) -> float:
    """The ratio of a step (from 0) where `goal` is that of steps after the warm-up, which falls towards it from 1; then
    the falling ratio of decay_steps. Between its ends it moves on the ladder alone."""
    if step < gating.warmup_steps:
        return _on_ladder(PLAIN, goal, step / gating.warmup_steps)
    if gating.final_token_ratio is None:
        return goal
    done = min(1.0, (step - gating.warmup_steps) / gating.decay_steps)
    return _on_ladder(gating.token_ratio, gating.final_token_ratio, done)


def _on_ladder(first: float, last: float, done: float) -> float:
    """From first to the lower last: the next ratio up from the straight line between them."""
    line = last + (first - last) * (1 - done)
    return min((ratio for ratio in (first, *LADDER, last) if line <= ratio <= first), default=first)


def _decided(belief: Belief, control: Control) -> Belief:
    """The same belief with the decision that follows from it."""
    if not control.follows_mass:
        return replace(belief, ratio=control.start, reason=f"ratioControl Fixed at {control.start:g}")
    if control.measures and PLAIN not in belief.seconds:
        return replace(belief, ratio=PLAIN, reason="measuring the time of a plain step")
    if not belief.mass:
        ratio = PLAIN if control.measures else control.start
        return replace(belief, ratio=ratio, reason="no token has been scored yet")
    holding = [ratio for ratio in reversed(control.allowed) if ratio < PLAIN and _holds(belief, control, ratio)]
    if not holding:
        highest = max((ratio for ratio in control.allowed if ratio < PLAIN), default=PLAIN)
        return replace(belief, ratio=PLAIN, reason=f"{_mass(belief, highest)}, below {control.target_mass:g}")
    if not control.measures:
        ratio = _towards(belief, control, holding[0])
        return replace(belief, ratio=ratio, reason=_mass(belief, ratio))
    if not any(ratio < PLAIN for ratio in belief.seconds):
        if belief.trial_wait:
            return replace(belief, ratio=PLAIN, reason="waiting for the time that gated steps took")
        return replace(belief, ratio=holding[0], reason="measuring the time of a gated step", trial_wait=TRIAL)
    costs = fit_costs(belief.seconds)
    gains = {ratio: control.worth(belief, ratio) / costs(ratio) for ratio in holding}
    paying = [ratio for ratio in holding if gains[ratio] > _least_gain(belief, ratio)]
    if not paying:
        best = max(gains, key=gains.__getitem__)
        worth, cost = control.worth(belief, best), costs(best)
        reason = f"at ratio {best:g} a step would be worth {worth:.2f} plain ones and take the time of {cost:.2f}"
        return replace(belief, ratio=PLAIN, reason=reason)
    ratio = _towards(belief, control, paying[0])
    gain = f"worth {control.worth(belief, ratio):.2f} plain steps in the time of {costs(ratio):.2f}"
    return replace(belief, ratio=ratio, reason=f"{_mass(belief, ratio)}; {gain}")


def _holds(belief: Belief, control: Control, ratio: float) -> bool:
    """Whether the top tokens hold the mass. The highest allowed ratio counts as such: nobody may ask for more of it."""
    slack = MASS_SLACK if ratio == belief.ratio else 0.0
    return ratio == control.allowed[0] or belief.mass[ratio] >= control.target_mass - slack


def _least_gain(belief: Belief, ratio: float) -> float:
    return 1.0 if ratio == belief.ratio else 1.0 + GAIN_MARGIN


def _towards(belief: Belief, control: Control, goal: float) -> float:
    """The next ratio on the way to the goal: one rung at a time, except out of the plain step."""
    if belief.ratio not in control.allowed or belief.ratio == PLAIN:
        return goal
    here, there = control.allowed.index(belief.ratio), control.allowed.index(goal)
    return control.allowed[here + max(-1, min(1, there - here))]


def _mass(belief: Belief, ratio: float) -> str:
    return f"the top {ratio:g} of tokens hold {belief.mass[ratio]:.2f} of the gradient mass"


def fit_costs(seconds: Mapping[float, float]) -> Callable[[float], float]:
    """Time of a step in plain steps, by its ratio: the straight line closest to what was measured, the plain step and
    at least one gated among it. Never free: where nothing was measured a line through noise may fall below 0."""
    slope, intercept = statistics.linear_regression(list(seconds), [s / seconds[PLAIN] for s in seconds.values()])
    return lambda ratio: max(0.05, intercept + slope * ratio)


def _smoothed(mean: Mapping[float, float], new: Mapping[float, float]) -> dict[float, float]:
    return {**mean, **{key: value + (mean.get(key, value) - value) * (1 - SMOOTHING) for key, value in new.items()}}


def _as_pairs(table: Mapping[float, Any]) -> list[list[Any]]:
    return [[key, value] for key, value in table.items()]
