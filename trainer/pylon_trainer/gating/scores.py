"""Scores: how much a token's gradient is worth, judged by the model's own logits.

Each function takes float32 logits N x V and labels N (every label a valid id) and returns float32 scores N, never
negative, higher for tokens that matter more. No gradient flows through a score; the caller masks unlabelled tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pylon_api.training import GatingStrategy

Score = Callable[[Tensor, Tensor], Tensor]


def gradient_norm(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Norm of the loss's gradient at the logits, |softmax - onehot|; from 0 to sqrt 2.

    The label's entry is lowered before squaring: 1 - 2 p + sum p^2 would cancel where the model is sure.
    """
    difference_NV = F.softmax(logits_NV, dim=-1)
    one = torch.full_like(labels_N, -1, dtype=difference_NV.dtype)
    norms_N: Tensor = torch.linalg.vector_norm(difference_NV.scatter_add(1, labels_N[:, None], one[:, None]), dim=-1)
    return norms_N


def entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:  # noqa: ARG001  every score has this signature
    """Entropy of the prediction, in nats."""
    log_p_NV = F.log_softmax(logits_NV, dim=-1)
    return -(log_p_NV.exp() * log_p_NV).sum(dim=-1)


def loss(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Cross entropy, in nats."""
    return F.cross_entropy(logits_NV, labels_N, reduction="none")


def margin(logits_NV: Tensor, labels_N: Tensor) -> Tensor:  # noqa: ARG001
    """1 minus the lead of the most probable token over the next one."""
    top_N2 = F.softmax(logits_NV, dim=-1).topk(2, dim=-1).values
    return 1 - (top_N2[:, 0] - top_N2[:, 1])


def uniform(logits_NV: Tensor, labels_N: Tensor) -> Tensor:  # noqa: ARG001
    """The same for every token: what Random samples by."""
    return logits_NV.new_ones(len(logits_NV))


SCORES: dict[GatingStrategy, Score] = {
    GatingStrategy.GRADIENT_NORM: gradient_norm,
    GatingStrategy.ENTROPY: entropy,
    GatingStrategy.LOSS: loss,
    GatingStrategy.MARGIN: margin,
    GatingStrategy.RANDOM: uniform,
}
