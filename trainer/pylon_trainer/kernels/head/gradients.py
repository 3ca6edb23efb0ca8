"""Loss and gradients of rows whose logits never exist at once: three products and few passes over chunks of logits.

Where the rows' logsumexp is known, logits come in chunks of the vocabulary: each turns into its own gradient in place,
the weight's gradient is written once and that of the hidden states is added up. Where it is not, they come in chunks of
rows, since a row's loss needs all of its logits: one pass gives loss and logsumexp, the next the gradient; the gradient
of the hidden states is written once and the weight's is added up. Sums are float32, so chunks cost no precision.

Bytes at 16,384 rows x 49,152 x 2048 in bfloat16, three chunks of rows: logits are written by a product, read by the two
passes and written by the second (6.4 GB), then read by two products; the float32 gradient of the weight, 0.4 GB, is
written once and read and written twice more (2.0 GB). A chunk of C rows spends 8 V H bytes on that sum beside 6 C V H
operations: on an H200 5,000 rows keep it below a twentieth of the products' time, 500 would not.

Shapes: K rows, H hidden width, V vocabulary, C rows or columns of a chunk of logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pylon_trainer.kernels import score
from pylon_trainer.kernels.head import reference
from pylon_trainer.kernels.score import CrossEntropy, Scores
from pylon_trainer.step import IGNORED

ROW_CHUNK_BYTES = {"cuda": 512 * 2**20, "cpu": 16 * 2**20}
"""Logits of a chunk of rows, by device: enough rows to make the sum of the weight's gradient cheap. That takes few on a
CPU, where products are slow."""
COLUMN_CHUNK_BYTES = {"cuda": 128 * 2**20, "cpu": 16 * 2**20}
"""Logits of a chunk of the vocabulary: large enough for the products to run at full speed."""
CHUNK_MULTIPLE = 256
ALIGNED_COLUMNS = 64
"""Products over logits whose rows begin anywhere run at a fraction of their speed; columns of zeros cost nothing."""


class LossGradients(NamedTuple):
    """What one look at all logits of K rows gives."""

    losses_K: Tensor
    """float32, nats, unweighted; 0 where the label is ignored."""
    d_hidden_KH: Tensor
    """float32, of the weighted sum of the losses."""
    d_weight_VH: Tensor | None
    """float32; None when it was not asked for."""
    nonfinite_rows: Tensor
    """int32 scalar: labelled rows with a NaN or infinite logit. If there are any, some gradients are NaN."""
    scores: Scores | None
    """Of the K rows, when they were asked for."""


def loss_gradients(
    hidden_KH: Tensor, weight_VH: Tensor, labels_K: Tensor, weights_K: Tensor, *, wants_weight: bool, wants_scores: bool
) -> LossGradients:
    """Losses and gradients of rows of which nothing is known, in chunks of rows."""
    K, V = len(hidden_KH), len(weight_VH)
    weight_VH = _padded(weight_VH)
    d_hidden_KH = torch.empty_like(hidden_KH, dtype=torch.float32)
    d_weight_VH = torch.empty_like(weight_VH, dtype=torch.float32) if wants_weight else None
    chunks = chunks_of_rows(K, weight_VH)
    buffer_CV = hidden_KH.new_empty(chunks[0].stop, len(weight_VH))
    look = score.score if wants_scores else score.cross_entropy
    seen: list[Scores | CrossEntropy] = []
    for rows in chunks:
        hidden_CH, labels_C = hidden_KH[rows], labels_K[rows]
        logits_CV = torch.mm(hidden_CH, weight_VH.T, out=buffer_CV[: len(hidden_CH)])
        seen.append(look(logits_CV[:, :V], labels_C))
        # A NaN or an infinity spreads from here to all gradients, and with them the step is skipped.
        weights_C = weights_K[rows] * poison(seen[-1].nonfinite_rows)
        logsumexp_C, weights_C = _without_ignored(labels_C, seen[-1].logsumexp_N, weights_C)
        logit_gradient_(logits_CV[:, :V], logsumexp_C, labels_C, weights_C)
        _multiply(logits_CV, weight_VH, out=d_hidden_KH[rows], adds=False)
        if d_weight_VH is not None:
            _multiply(logits_CV.T, hidden_CH, out=d_weight_VH, adds=rows.start > 0)
    return LossGradients(
        torch.cat([part.loss_N for part in seen]),
        d_hidden_KH,
        None if d_weight_VH is None else d_weight_VH[:V],
        torch.stack([part.nonfinite_rows for part in seen]).sum(dtype=torch.int32),
        Scores.join([part for part in seen if isinstance(part, Scores)]) if wants_scores else None,
    )


def known_gradients(
    hidden_KH: Tensor,
    weight_VH: Tensor,
    labels_K: Tensor,
    weights_K: Tensor,
    logsumexp_K: Tensor,
    *,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients with respect to hidden states and weight, float32, of rows that were scored, in chunks of columns."""
    d_hidden_KH = torch.empty_like(hidden_KH, dtype=torch.float32) if wants_hidden else None
    d_weight_VH = torch.empty_like(weight_VH, dtype=torch.float32) if wants_weight else None
    logsumexp_K, weights_K = _without_ignored(labels_K, logsumexp_K, weights_K)
    column_bytes = len(hidden_KH) * hidden_KH.itemsize
    chunks = _chunks(len(weight_VH), column_bytes, COLUMN_CHUNK_BYTES[hidden_KH.device.type])
    buffer_KC = hidden_KH.new_empty(len(hidden_KH), _aligned(chunks[0].stop))
    for columns in chunks:
        C = columns.stop - columns.start
        weight_CH = _padded(weight_VH[columns])
        logits_KC = torch.mm(hidden_KH, weight_CH.T, out=buffer_KC[:, : len(weight_CH)])
        logit_gradient_(logits_KC[:, :C], logsumexp_K, labels_K - columns.start, weights_K)
        if d_hidden_KH is not None:
            _multiply(logits_KC, weight_CH, out=d_hidden_KH, adds=columns.start > 0)
        if d_weight_VH is not None:
            _multiply(logits_KC[:, :C].T, hidden_KH, out=d_weight_VH[columns], adds=False)
    return d_hidden_KH, d_weight_VH


def poison(nonfinite_rows: Tensor) -> Tensor:
    """float32 scalar: NaN when there is a row that is not finite, else 1. A factor for what must then be no number."""
    return torch.ones_like(nonfinite_rows, dtype=torch.float32).masked_fill(nonfinite_rows > 0, torch.nan)


def logit_gradient_(logits_KC: Tensor, logsumexp_K: Tensor, labels_K: Tensor, weights_K: Tensor) -> None:
    """Turn logits in place into weight * (softmax - onehot), where a label outside [0, C) belongs to another chunk."""
    if logits_KC.is_cuda:
        from pylon_trainer.kernels.head import triton as fused

        fused.logit_gradient_(logits_KC, logsumexp_K, labels_K, weights_K)
    else:
        reference.logit_gradient_(logits_KC, logsumexp_K, labels_K, weights_K)


def chunks_of_rows(rows: int, weight_VH: Tensor) -> list[slice]:
    """Rows whose logits are made at once."""
    return _chunks(rows, len(weight_VH) * weight_VH.itemsize, ROW_CHUNK_BYTES[weight_VH.device.type])


def _without_ignored(labels_K: Tensor, logsumexp_K: Tensor, weights_K: Tensor) -> tuple[Tensor, Tensor]:
    """logsumexp and weight that leave no gradient, and no NaN, where the label is ignored: e^(x - inf) = 0."""
    labelled_K = labels_K != IGNORED
    return logsumexp_K.where(labelled_K, torch.inf), weights_K.where(labelled_K, 0.0)


def _multiply(left: Tensor, right: Tensor, *, out: Tensor, adds: bool) -> None:
    """out = left @ right, or out += left @ right, where out is float32."""
    if left.dtype == torch.float32:
        torch.addmm(out, left, right, beta=float(adds), out=out)
    elif out.is_cuda:
        torch.addmm(out, left, right, out_dtype=torch.float32, beta=float(adds), out=out)
    elif adds:
        out.add_(left @ right)
    else:
        out.copy_(left @ right)


def _aligned(columns: int) -> int:
    return -(-columns // ALIGNED_COLUMNS) * ALIGNED_COLUMNS


def _padded(weight_CH: Tensor) -> Tensor:
    """With rows of zeros below it, so that rows of logits begin on aligned places: their logits are 0, left alone, and
    add nothing to any product."""
    missing = _aligned(len(weight_CH)) - len(weight_CH)
    return F.pad(weight_CH, (0, 0, 0, missing)) if missing else weight_CH


def _chunks(length: int, item_bytes: int, limit_bytes: int) -> list[slice]:
    """Slices of about equal length that fit the limit, whole multiples of CHUNK_MULTIPLE but for the last. At least
    one, if an empty one."""
    chunks = max(1, -(-length * item_bytes // limit_bytes))
    size = max(1, -(-length // (chunks * CHUNK_MULTIPLE))) * CHUNK_MULTIPLE
    return [slice(start, min(start + size, length)) for start in range(0, max(length, 1), size)]
