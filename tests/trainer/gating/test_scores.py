"""Scores are what their names say, checked on distributions worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pylon_api.training import GatingStrategy
from pylon_trainer.gating.scores import judge
from pylon_trainer.kernels.score import score

HALVES = torch.tensor([0.5, 0.25, 0.25]).log()[None]
STRATEGIES = [strategy for strategy in GatingStrategy if strategy is not GatingStrategy.OFF]


def judged(strategy: str, logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    return judge(GatingStrategy(strategy), score(logits_NV, labels_N))


@pytest.mark.parametrize(
    ("strategy", "label", "expected"),
    [
        ("GradientNorm", 0, math.sqrt(0.25 + 0.0625 + 0.0625)),
        ("GradientNorm", 1, math.sqrt(0.25 + 0.5625 + 0.0625)),
        ("Entropy", 0, 1.5 * math.log(2)),
        ("Loss", 1, math.log(4)),
        ("Margin", 2, 0.75),
        ("Difficulty", 0, 1.5 * math.log(2) + 0.5),
        ("Combined", 0, 1.5 * math.log(2) + 0.5 + 0.75),
        ("Random", 2, 1.0),
    ],
)
def test_by_hand(strategy: str, label: int, expected: float) -> None:
    assert judged(strategy, HALVES, torch.tensor([label])).item() == pytest.approx(expected, rel=1e-6)


def test_gradient_norm_keeps_its_digits_where_the_model_is_sure() -> None:
    logits_1V = torch.tensor([[10.0, 0.0, 0.0]])
    rest = 2 / (math.exp(10) + 2)
    expected = math.sqrt(rest**2 + 2 * (rest / 2) ** 2)
    assert judged("GradientNorm", logits_1V, torch.tensor([0])).item() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("logit", [0.0, 1e4, -1e4, math.nan, math.inf, -math.inf])
def test_never_negative_and_always_finite(strategy: GatingStrategy, logit: float) -> None:
    extreme_NV = torch.zeros(3, 5)
    extreme_NV[:, 1] = logit
    scores_N = judged(strategy, extreme_NV, torch.tensor([0, 1, 2]))
    assert scores_N.shape == (3,)
    assert torch.isfinite(scores_N).all()
    assert (scores_N >= 0).all()
