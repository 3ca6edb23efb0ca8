"""What the controller's figures mean: how far a step may go, what a port's promise is worth, when to hold still.

Decisions and nothing else, on numbers that all ranks have alike. Two loops, each of which compares what was promised
with what was seen on the same tokens:

- A step promises the loss change that its gradients predict. The classical trust region (Conn, Gould & Toint 2000;
  Nocedal & Wright 2006, algorithm 4.1) lets steps go as far as such promises hold. The limit is on a block's update as
  a share of its weights; a block that it stops takes the step of a proximal term whose weight lambda is just large
  enough, so the limit is 1 / lambda in units of the block.
- A gradient at a port promises what a change of advice does. Its gain is the regression of what was seen on that.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

TARGET_RATIO = 0.1
"""Largest update of a block in one step, as a share of its weights, at first."""
CEILING_RATIO = 0.3
"""And at most, whatever was kept of promises."""
FLOOR_RATIO = 1e-5
"""A run whose promises never hold still moves."""
POOR_AGREEMENT, GOOD_AGREEMENT = 0.25, 0.75
"""Share of a promise that must be kept for the limit to stay, and to grow: Nocedal & Wright's."""

FAST_BETA, SLOW_BETA = 0.01, 0.001
"""Weight of a step in a gain, at the first observation and at last."""
LEAST_GAIN, MOST_GAIN = 0.1, 10.0
HEALTHY_GAINS = 0.3, 3.0
"""Outside, the gradients at that port say little about what advice does."""
RESOLUTION = 1e-5
"""Changes of the loss, as a share of it, below which rounding decides."""

CHECK_STEPS = 128
"""Steps between two looks at what a change of advice does."""
HELD_TURNS = 4
"""Turns for which the advice is held when a gain is not healthy, or a part of the model has begun anew: the weights
alone then go on, to where gradients at ports mean something again."""


@dataclass(frozen=True, slots=True)
class Promise:
    """A change of the mean loss, nats, predicted to first order and then seen on the same tokens."""

    predicted: float
    seen: float
    loss: float
    """Before."""

    @property
    def agreement(self) -> float | None:
        """Share that was kept; None when too little was promised to tell, or a figure is not finite."""
        if not all(map(math.isfinite, (self.predicted, self.seen, self.loss))):
            return None
        return self.seen / self.predicted if abs(self.predicted) > RESOLUTION * abs(self.loss) else None


@dataclass(frozen=True, slots=True)
class Belief:
    """What the controller holds true after a turn."""

    gains: tuple[float, ...]
    """Of every kind of port, centred at 1."""
    limit: float = TARGET_RATIO
    """On a block's update in one step, as a share of its weights."""
    held_until: int = 0
    """Step from which advice may change again."""
    checks: int = 0
    """Looks at what a change of advice does."""
    wrong_signs: int = 0
    """Of those, how many saw the loss move the other way."""
    ratio: float | None = None
    """Largest update of a block in the last step that was looked at, as a share of its weights, before the limit."""
    kept: float | None = None
    """Share of the loss change which that step promised that was seen."""

    @property
    def is_healthy(self) -> bool:
        """Whether gradients at all ports are worth following."""
        low, high = HEALTHY_GAINS
        return all(low <= gain <= high for gain in self.gains)

    def after_step(self, promise: Promise, ratio: float) -> Belief:
        """Having seen what a step did. ratio: the largest update of a block, as a share of its weights."""
        return replace(self, limit=next_limit(self.limit, promise, ratio), ratio=ratio, kept=promise.agreement)

    def after_check(self, port: int, promise: Promise, step: int, turn_steps: int) -> Belief:
        """Having seen what a change of advice at one kind of port did."""
        agreement = promise.agreement
        if agreement is None:
            return self
        gain = next_gain(self.gains[port], agreement, self.checks // len(self.gains), CHECK_STEPS * len(self.gains))
        believed = replace(
            self,
            gains=(*self.gains[:port], gain, *self.gains[port + 1 :]),
            checks=self.checks + 1,
            wrong_signs=self.wrong_signs + (agreement < 0),
        )
        return believed if believed.is_healthy else believed.hold(step, HELD_TURNS * turn_steps)

    def hold(self, step: int, steps: int) -> Belief:
        """Leave advice as it is for so many steps from this one."""
        return replace(self, held_until=max(self.held_until, step + steps))

    def to_state(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "gains": list(self.gains)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Belief:
        """What to_state gave."""
        return cls(**{**state, "gains": tuple(state["gains"])})


def next_limit(limit: float, promise: Promise, ratio: float) -> float:
    """The trust region's rule. A step that promised nothing says nothing."""
    agreement = promise.agreement
    if agreement is None or promise.predicted >= 0:
        return limit
    if agreement < POOR_AGREEMENT:
        return max(FLOOR_RATIO, min(limit, ratio) / 2)
    return min(CEILING_RATIO, 2 * limit) if agreement > GOOD_AGREEMENT else limit


def next_gain(gain: float, agreement: float, observations: int, steps: int) -> float:
    """Regression of seen on predicted, through the origin, each observation in units of its prediction.

    observations: of this port before. steps: since the last of them; each would have weighed beta, which falls with
    the root of the number of observations.
    """
    beta = max(SLOW_BETA, FAST_BETA / math.sqrt(1 + observations))
    weight = 1 - (1 - beta) ** steps
    sample = min(MOST_GAIN, max(-MOST_GAIN, agreement))
    return min(MOST_GAIN, max(LEAST_GAIN, gain + weight * (sample - gain)))
