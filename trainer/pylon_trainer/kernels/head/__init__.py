"""The output head without its logits: scores of every row, losses, and gradients of the rows that carry loss.

For N rows, hidden width H and vocabulary V, scoring costs one product (2 N V H operations) and each scored row that
carries loss three more (recomputed logits, gradient of hidden, gradient of weight); a plain step, where all rows do,
needs those three alone. Nothing of size N x V is ever allocated. Refuses heads with a bias: no model here has one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pylon_trainer.kernels.head import gradients, reference
from pylon_trainer.kernels.head.gradients import LossGradients, poison
from pylon_trainer.kernels.head.selected import SelectedCrossEntropy
from pylon_trainer.kernels.score.reference import CrossEntropy, Scores

__all__ = [
    "LossGradients",
    "cross_entropy",
    "known_gradients",
    "loss_gradients",
    "poison",
    "score",
    "selected_cross_entropy",
]


def score(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Scores:
    """Score every row of hidden @ weight^T against its label, without gradients and without waiting for the device.

    hidden_NH and weight_VH: of one type, float32, bfloat16 or float16 (under autocast both are cast to its type).
    labels_N: int64 in [0, V) or IGNORED. On CUDA logits are float32 sums, not rounded to the inputs' type.

    Raises ValueError when shapes or types do not fit.
    """
    hidden_NH, weight_VH = _checked(hidden_NH, weight_VH, labels_N)
    if hidden_NH.is_cuda:
        from pylon_trainer.kernels.head import triton as fused

        return fused.score(hidden_NH, weight_VH, labels_N)
    return Scores.join(
        [reference.score(hidden_NH[rows], weight_VH, labels_N[rows]) for rows in _rows(hidden_NH, weight_VH)]
    )


def cross_entropy(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> CrossEntropy:
    """The loss of every row, without gradients; arguments and errors as `score` has them."""
    hidden_NH, weight_VH = _checked(hidden_NH, weight_VH, labels_N)
    if hidden_NH.is_cuda:
        from pylon_trainer.kernels.head import triton as fused

        scores = fused.score(hidden_NH, weight_VH, labels_N)
        return CrossEntropy(scores.loss_N, scores.logsumexp_N, scores.nonfinite_rows)
    return CrossEntropy.join(
        [reference.cross_entropy(hidden_NH[rows], weight_VH, labels_N[rows]) for rows in _rows(hidden_NH, weight_VH)]
    )


def loss_gradients(
    hidden_KH: Tensor,
    weight_VH: Tensor,
    labels_K: Tensor,
    weights_K: Tensor,
    *,
    wants_weight: bool = True,
    wants_scores: bool = False,
) -> LossGradients:
    """Losses of K rows, and the gradients of sum over k of weights_K[k] * losses_K[k], when nothing of them is known.

    Arguments and errors as `score` has them, weights_K float32 constants. Products run in the inputs' type and chunks
    of logits are rounded to it; gradients are float32. Scores, if wanted, cost no product of their own.
    """
    hidden_KH, weight_VH = _checked(hidden_KH, weight_VH, labels_K)
    return gradients.loss_gradients(
        hidden_KH, weight_VH, labels_K, weights_K, wants_weight=wants_weight, wants_scores=wants_scores
    )


def known_gradients(
    hidden_KH: Tensor,
    weight_VH: Tensor,
    labels_K: Tensor,
    weights_K: Tensor,
    logsumexp_K: Tensor,
    *,
    wants_weight: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The same gradients, K x H and V x H, of rows whose `logsumexp_N` is known from their scores."""
    hidden_KH, weight_VH = _checked(hidden_KH, weight_VH, labels_K)
    d_hidden_KH, d_weight_VH = gradients.known_gradients(
        hidden_KH, weight_VH, labels_K, weights_K, logsumexp_K, wants_hidden=True, wants_weight=wants_weight
    )
    assert d_hidden_KH is not None
    return d_hidden_KH, d_weight_VH


def selected_cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    rows_K: Tensor,
    weights_K: Tensor,
    scores: Scores | None = None,
) -> Tensor:
    """float32 scalar: sum over k of weights_K[k] times the cross entropy of row rows_K[k].

    rows_K: int64 rows that carry loss, in any order, possibly none. weights_K: float32 constants (no gradient flows to
    them). scores: what `score` gave for the same inputs, which saves scoring the chosen rows anew. Rows whose label is
    IGNORED add nothing. Gradients flow to hidden_NH and weight_VH, once. Products run in the inputs' type; chunks of
    logits are rounded to it.

    Raises ValueError when shapes or types do not fit.
    """
    cast_hidden_NH, cast_weight_VH = _checked(hidden_NH, weight_VH, labels_N)
    if rows_K.ndim != 1 or rows_K.shape != weights_K.shape:
        raise ValueError(f"rows {tuple(rows_K.shape)} and weights {tuple(weights_K.shape)} must both be (K,)")
    labels_K = labels_N[rows_K]
    if scores is None:
        known = cross_entropy(cast_hidden_NH[rows_K], cast_weight_VH, labels_K)
        losses_K, logsumexp_K = known.loss_N, known.logsumexp_N
    else:
        losses_K, logsumexp_K = scores.loss_N[rows_K], scores.logsumexp_N[rows_K]
    loss: Tensor = SelectedCrossEntropy.apply(
        hidden_NH,
        weight_VH,
        cast_hidden_NH,
        cast_weight_VH,
        labels_K,
        rows_K,
        weights_K.detach().float(),
        losses_K,
        logsumexp_K,
    )
    return loss


def _rows(hidden_NH: Tensor, weight_VH: Tensor) -> list[slice]:
    """Chunks of rows that the reference can take at once."""
    return gradients.chunks_of_rows(len(hidden_NH), weight_VH)


def _checked(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and weight, detached, in the type that the product runs in."""
    hidden_NH, weight_VH = hidden_NH.detach(), weight_VH.detach()
    if hidden_NH.ndim != 2 or weight_VH.ndim != 2 or hidden_NH.shape[1] != weight_VH.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden_NH.shape)} and weight {tuple(weight_VH.shape)} must be (N, H) and (V, H)"
        )
    if labels_N.shape != hidden_NH.shape[:1]:
        raise ValueError(
            f"labels {tuple(labels_N.shape)} must have one entry per row of hidden {tuple(hidden_NH.shape)}"
        )
    device = hidden_NH.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_NH, weight_VH = hidden_NH.to(dtype), weight_VH.to(dtype)
    if hidden_NH.dtype != weight_VH.dtype or hidden_NH.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"hidden is {hidden_NH.dtype}, weight {weight_VH.dtype}; give both as float32, bfloat16 or float16"
        )
    return hidden_NH, weight_VH
