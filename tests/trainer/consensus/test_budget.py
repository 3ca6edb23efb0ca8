"""Which channels are chosen: within the budget, for what they save, and alike from the same figures."""

from __future__ import annotations

import itertools
import random

import pytest

from pylon_trainer.consensus.budget import Choice, choose
from pylon_trainer.errors import ConfigError

MATRICES = [Choice("Int8", 1000, 0.1), Choice("Int4", 500, 10.0), Choice("Dct", 20, 900.0)]
VECTORS = [Choice("Float32", 40, 0.0), Choice("Int8", 10, 0.1)]


@pytest.mark.parametrize(
    ("budget_bytes", "expected"),
    [
        (None, ("Int8", "Float32")),
        (1040, ("Int8", "Float32")),
        (1039, ("Int8", "Int8")),
        (1009, ("Int4", "Float32")),
        (540, ("Int4", "Float32")),
        (539, ("Int4", "Int8")),
        (60, ("Dct", "Float32")),
        (30, ("Dct", "Int8")),
    ],
)
def test_what_loses_least_within_the_budget_is_chosen(budget_bytes: int | None, expected: tuple[str, str]) -> None:
    chosen = choose({"matrices": MATRICES, "vectors": VECTORS}, budget_bytes)
    assert (chosen["matrices"].name, chosen["vectors"].name) == expected


def test_a_budget_that_is_too_small_names_the_least_possible() -> None:
    with pytest.raises(ConfigError) as refusal:
        choose({"matrices": MATRICES, "vectors": VECTORS}, 34, control_bytes=5)
    assert str(refusal.value) == (
        "training.consensus.bytesPerStep 34 is too small: the least possible is 35 bytes a step "
        "(matrices Dct 20, vectors Int8 10); raise it to that, or raise everySteps"
    )


@pytest.mark.parametrize("seed", range(20))
def test_choices_come_near_the_best_of_all_combinations(seed: int) -> None:
    draw = random.Random(seed)
    ladders = {
        group: [Choice(str(step), 2**step * draw.randint(8, 12), 1000 * draw.random() / 2**step) for step in range(6)]
        for group in "abc"
    }
    budget_bytes = draw.randint(200, 700)
    combinations = list(itertools.product(*ladders.values()))
    affordable = [c for c in combinations if sum(choice.bytes_per_step for choice in c) <= budget_bytes]
    least, most = min(lost(c) for c in affordable), max(lost(c) for c in affordable)
    chosen = choose(ladders, budget_bytes)
    assert sum(choice.bytes_per_step for choice in chosen.values()) <= budget_bytes
    assert lost(tuple(chosen.values())) <= least + 0.1 * (most - least)


def lost(choices: tuple[Choice, ...]) -> float:
    return sum(choice.lost for choice in choices)
