"""Which score each strategy ranks tokens by: how much a token's gradient is worth, judged by the model's own logits.

The statistics behind it come from one look at the logits (`kernels.score`); nothing here sees logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pylon_api.training import GatingStrategy
from pylon_trainer.kernels.score import Scores

STRATEGIES: dict[GatingStrategy, Callable[[Scores], Tensor]] = {
    GatingStrategy.GRADIENT_NORM: lambda scores: scores.gradient_norm_N,
    GatingStrategy.ENTROPY: lambda scores: scores.entropy_N,
    GatingStrategy.LOSS: lambda scores: scores.loss_N,
    GatingStrategy.MARGIN: lambda scores: 1 - scores.margin_N,
    # The library `cggr` ranks by the next two less 1, which is the same order; from 0 they can be sampled by.
    GatingStrategy.COMBINED: lambda scores: scores.entropy_N + (1 - scores.confidence_N) + (1 - scores.margin_N),
    GatingStrategy.DIFFICULTY: lambda scores: scores.entropy_N + (1 - scores.confidence_N),
    GatingStrategy.RANDOM: lambda scores: torch.ones_like(scores.loss_N),
}


def judge(strategy: GatingStrategy, scores: Scores) -> Tensor:
    """float32 scores N, higher for tokens that matter more, finite and never negative whatever the logits were. Without
    meaning where there is no label."""
    return STRATEGIES[strategy](scores).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp_min(0.0)
