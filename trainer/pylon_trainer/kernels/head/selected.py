"""Cross entropy of chosen rows whose logits never exist at once: backward recomputes them in chunks of the vocabulary.

Shapes: N rows (tokens), H hidden width, V vocabulary, K chosen rows, C columns of a chunk of logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pylon_trainer.kernels.head.reference import logit_gradient_ as reference_logit_gradient_
from pylon_trainer.step import IGNORED

CHUNK_BYTES = 128 * 2**20
"""Size of a chunk of logits: large enough for the products to run at full speed, small beside a model's activations."""
COLUMN_MULTIPLE = 256


class SelectedCrossEntropy(torch.autograd.Function):
    """Loss from scores already known; gradient from logits recomputed for the chosen rows alone."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        labels_K: Tensor,
        rows_K: Tensor,
        weights_K: Tensor,
        losses_K: Tensor,
        logsumexp_K: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(hidden_NH, weight_VH, labels_K, rows_K, weights_K, logsumexp_K)
        return weights_K @ losses_K

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, labels_K, rows_K, weights_K, logsumexp_K = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        hidden_KH = hidden_NH[rows_K]
        # An ignored row has probability e^(x - inf) = 0 everywhere and weight 0: no gradient, and no NaN.
        labelled_K = labels_K != IGNORED
        logsumexp_K = logsumexp_K.where(labelled_K, torch.inf)
        scale_K = (d_loss * weights_K).where(labelled_K, 0.0)

        d_hidden_KH = torch.zeros_like(hidden_KH, dtype=torch.float32)
        d_weight_VH = torch.empty_like(weight_VH) if wants_weight else None
        for start, end in _chunks(len(weight_VH), len(hidden_KH) * hidden_KH.itemsize):
            weight_CH = weight_VH[start:end]
            logits_KC = hidden_KH @ weight_CH.T
            logit_gradient_(logits_KC, logsumexp_K, labels_K - start, scale_K)
            if wants_hidden:
                d_hidden_KH += logits_KC @ weight_CH
            if d_weight_VH is not None:
                torch.mm(logits_KC.T, hidden_KH, out=d_weight_VH[start:end])
        # index_add_ sums rows that were chosen twice; of distinct rows the result is the same in every run.
        d_hidden_NH = (
            torch.zeros_like(hidden_NH).index_add_(0, rows_K, d_hidden_KH.to(hidden_NH.dtype)) if wants_hidden else None
        )
        return d_hidden_NH, d_weight_VH, None, None, None, None, None


def logit_gradient_(logits_KC: Tensor, logsumexp_K: Tensor, labels_K: Tensor, weights_K: Tensor) -> None:
    """Turn logits in place into weight * (softmax - onehot), where a label outside [0, C) belongs to another chunk."""
    if logits_KC.is_cuda:
        from pylon_trainer.kernels.head import triton as fused

        fused.logit_gradient_(logits_KC, logsumexp_K, labels_K, weights_K)
    else:
        reference_logit_gradient_(logits_KC, logsumexp_K, labels_K, weights_K)


def _chunks(columns: int, column_bytes: int) -> list[tuple[int, int]]:
    """Ranges of columns that fit CHUNK_BYTES, whole multiples of COLUMN_MULTIPLE but for the last."""
    multiples = max(1, CHUNK_BYTES // max(1, column_bytes * COLUMN_MULTIPLE))
    size = multiples * COLUMN_MULTIPLE
    return [(start, min(start + size, columns)) for start in range(0, columns, size)]
