"""The output head without its logits: score every row, then loss and gradient on chosen rows only.

For N rows, hidden width H and vocabulary V, scoring costs one product (2 N V H operations) and each chosen row three
(recomputed logits, gradient of hidden, gradient of weight), against three for every row in a plain step. Nothing of
size N x V is ever allocated on CUDA. Refuses heads with a bias: no model here has one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pylon_trainer.kernels.head import reference
from pylon_trainer.kernels.head.selected import SelectedCrossEntropy
from pylon_trainer.kernels.score.reference import Scores

__all__ = ["score", "selected_cross_entropy"]


def score(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Scores:
    """Score every row of hidden @ weight^T against its label, without gradients and without waiting for the device.

    hidden_NH and weight_VH: of one type, float32, bfloat16 or float16 (under autocast both are cast to its type).
    labels_N: int64 in [0, V) or IGNORED. Logits are float32 sums, not rounded to the inputs' type.

    Raises ValueError when shapes or types do not fit.
    """
    hidden_NH, weight_VH = _checked(hidden_NH.detach(), weight_VH.detach(), labels_N)
    if hidden_NH.is_cuda:
        from pylon_trainer.kernels.head import triton as fused

        return fused.score(hidden_NH, weight_VH, labels_N)
    return reference.score(hidden_NH, weight_VH, labels_N)


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
    hidden_NH, weight_VH = _checked(hidden_NH, weight_VH, labels_N)
    if rows_K.ndim != 1 or rows_K.shape != weights_K.shape:
        raise ValueError(f"rows {tuple(rows_K.shape)} and weights {tuple(weights_K.shape)} must both be (K,)")
    labels_K = labels_N[rows_K]
    if scores is None:
        scores = score(hidden_NH[rows_K], weight_VH, labels_K)
        losses_K, logsumexp_K = scores.loss_N, scores.logsumexp_N
    else:
        losses_K, logsumexp_K = scores.loss_N[rows_K], scores.logsumexp_N[rows_K]
    weights_K = weights_K.detach().float()
    loss: Tensor = SelectedCrossEntropy.apply(hidden_NH, weight_VH, labels_K, rows_K, weights_K, losses_K, logsumexp_K)
    return loss


def _checked(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and weight in the type that the product runs in."""
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
