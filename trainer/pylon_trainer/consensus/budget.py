"""Which channel each group gets, so that all together stay below the bytes that a step may take.

A decision and nothing else: what channels cost is known, what they lose was measured (calibration.py), and ranks that
decide from the same figures decide alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pylon_trainer.errors import SharedConfigError

K = TypeVar("K", bound=str)
"""What groups are told apart by."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One channel that a group could have."""

    name: str
    bytes_per_step: int
    lost: float
    """What it leaves behind each step: squared error as a share of the squared norm, times the group's values."""


def choose(choices: Mapping[K, Sequence[Choice]], budget_bytes: int | None, control_bytes: int = 0) -> dict[K, Choice]:
    """The choice of each group that together lose little within the budget.

    Begins with the cheapest and goes on with whatever gains most for a byte more, while it fits: the greedy way through
    the multiple-choice knapsack problem (Sinha & Zoltners 1979), which ends within one step of the best.

    budget_bytes: of which control_bytes are spoken for; None is no limit. SharedConfigError naming the least possible
    when it is below that.
    """
    chosen = {group: min(offered, key=lambda c: (c.bytes_per_step, c.lost)) for group, offered in choices.items()}
    least_bytes = control_bytes + sum(choice.bytes_per_step for choice in chosen.values())
    if budget_bytes is not None and least_bytes > budget_bytes:
        raise SharedConfigError(
            f"training.consensus.bytesPerStep {budget_bytes} is too small: the least possible is {least_bytes} bytes "
            f"a step ({_describe(chosen)}); raise it to that, or raise everySteps"
        )
    while True:
        spent_bytes = control_bytes + sum(choice.bytes_per_step for choice in chosen.values())
        steps = [
            (_gain_per_byte(chosen[group], choice), group, choice)
            for group, offered in choices.items()
            for choice in offered
            if choice.lost < chosen[group].lost
            and (
                budget_bytes is None
                or spent_bytes + choice.bytes_per_step - chosen[group].bytes_per_step <= budget_bytes
            )
        ]
        if not steps:
            return chosen
        _, group, choice = max(steps, key=lambda step: step[0])
        chosen[group] = choice


def _gain_per_byte(now: Choice, then: Choice) -> float:
    more_bytes = then.bytes_per_step - now.bytes_per_step
    return (now.lost - then.lost) / more_bytes if more_bytes > 0 else float("inf")


def _describe(chosen: Mapping[K, Choice]) -> str:
    return ", ".join(f"{group} {choice.name} {choice.bytes_per_step}" for group, choice in chosen.items())
