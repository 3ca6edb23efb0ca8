"""Scores are what their names say, checked on distributions worked out by hand and against autograd."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pylon_api.training import GatingStrategy
from pylon_trainer.gating.scores import SCORES, entropy, gradient_norm, loss, margin

HALVES = torch.tensor([0.5, 0.25, 0.25]).log()[None]


@pytest.mark.parametrize(
    ("score", "label", "expected"),
    [
        (gradient_norm, 0, math.sqrt(0.25 + 0.0625 + 0.0625)),
        (gradient_norm, 1, math.sqrt(0.25 + 0.5625 + 0.0625)),
        (entropy, 0, 1.5 * math.log(2)),
        (loss, 1, math.log(4)),
        (margin, 2, 0.75),
    ],
)
def test_by_hand(score, label: int, expected: float) -> None:
    assert score(HALVES, torch.tensor([label])).item() == pytest.approx(expected, rel=1e-6)


def test_gradient_norm_is_the_norm_of_the_gradient() -> None:
    logits_NV = (torch.randn(20, 11, generator=torch.Generator().manual_seed(0)) * 4).requires_grad_()
    labels_N = torch.arange(20) % 11
    F.cross_entropy(logits_NV, labels_N, reduction="sum").backward()
    assert logits_NV.grad is not None
    torch.testing.assert_close(gradient_norm(logits_NV.detach(), labels_N), logits_NV.grad.norm(dim=-1))


def test_gradient_norm_keeps_its_digits_where_the_model_is_sure() -> None:
    logits_1V = torch.tensor([[10.0, 0.0, 0.0]])
    rest = 2 / (math.exp(10) + 2)
    expected = math.sqrt(rest**2 + 2 * (rest / 2) ** 2)
    assert gradient_norm(logits_1V, torch.tensor([0])).item() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("strategy", [s for s in GatingStrategy if s is not GatingStrategy.OFF])
@pytest.mark.parametrize("logits", [0.0, 1e4, -1e4])
def test_never_negative_and_never_nan(strategy: GatingStrategy, logits: float) -> None:
    extreme_NV: Tensor = torch.zeros(3, 5)
    extreme_NV[:, 1] = logits
    scores_N = SCORES[strategy](extreme_NV, torch.tensor([0, 1, 2]))
    assert scores_N.shape == (3,)
    assert torch.isfinite(scores_N).all()
    assert (scores_N >= 0).all()
