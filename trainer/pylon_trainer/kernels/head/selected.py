"""Cross entropy of chosen rows as a function that autograd can differentiate, once.

Shapes: N rows (tokens), H hidden width, V vocabulary, K chosen rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pylon_trainer.kernels.head.gradients import known_gradients


class SelectedCrossEntropy(torch.autograd.Function):
    """Loss from scores already known; gradient from logits recomputed for the chosen rows alone.

    Takes hidden states and weight twice: as they are, to receive gradients in their own type, unrounded; and cast to
    the type that the products run in.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        cast_hidden_NH: Tensor,
        cast_weight_VH: Tensor,
        labels_K: Tensor,
        rows_K: Tensor,
        weights_K: Tensor,
        losses_K: Tensor,
        logsumexp_K: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(cast_hidden_NH, cast_weight_VH, labels_K, rows_K, weights_K, logsumexp_K)
        ctx.types = hidden_NH.dtype, weight_VH.dtype
        return weights_K @ losses_K

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, labels_K, rows_K, weights_K, logsumexp_K = ctx.saved_tensors
        hidden_type, weight_type = ctx.types
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        d_hidden_KH, d_weight_VH = known_gradients(
            hidden_NH[rows_K],
            weight_VH,
            labels_K,
            d_loss * weights_K,
            logsumexp_K,
            wants_hidden=wants_hidden,
            wants_weight=wants_weight,
        )
        d_hidden_NH = None
        if d_hidden_KH is not None:
            # index_add_ sums rows that were chosen twice; of distinct rows the result is the same in every run.
            d_hidden_NH = torch.zeros_like(hidden_NH, dtype=hidden_type)
            d_hidden_NH.index_add_(0, rows_K, d_hidden_KH.to(hidden_type))
        return d_hidden_NH, None if d_weight_VH is None else d_weight_VH.to(weight_type), *[None] * 7
