"""One-pass scores of logits: how uncertain, how wrong and how much gradient each token has.

Refuses to choose tokens: that is the gate's business.
"""

from __future__ import annotations

from torch import Tensor

from pylon_trainer.kernels.score import reference
from pylon_trainer.kernels.score.reference import CrossEntropy, Scores

__all__ = ["CrossEntropy", "Scores", "cross_entropy", "score"]


def score(logits_NV: Tensor, labels_N: Tensor) -> Scores:
    """Score every row of logits against its label, without gradients and without waiting for the device.

    logits_NV: float32, bfloat16 or float16; rows may be strided, the vocabulary must be contiguous. On CUDA each logit
    is read once. labels_N: int64 in [0, V), or IGNORED for rows that are not to be scored; other values are undefined
    behaviour, as checking them would wait for the device.

    Raises ValueError when shapes, types or strides do not fit.
    """
    logits_NV, labels_N = _checked(logits_NV, labels_N)
    if logits_NV.is_cuda:
        from pylon_trainer.kernels.score import triton as fused

        return fused.score(logits_NV, labels_N)
    return reference.score(logits_NV, labels_N)


def cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> CrossEntropy:
    """Loss and logsumexp of every row, as `score` has them.

    On CUDA it is the same kernel: one look at each logit is what both cost.
    """
    logits_NV, labels_N = _checked(logits_NV, labels_N)
    if logits_NV.is_cuda:
        from pylon_trainer.kernels.score import triton as fused

        scores = fused.score(logits_NV, labels_N)
        return CrossEntropy(scores.loss_N, scores.logsumexp_N, scores.nonfinite_rows)
    return reference.cross_entropy(logits_NV, labels_N)


def _checked(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    if logits_NV.ndim != 2 or labels_N.shape != logits_NV.shape[:1]:
        raise ValueError(
            f"score: logits {tuple(logits_NV.shape)} and labels {tuple(labels_N.shape)} must be (N, V) and (N,)"
        )
    if not logits_NV.is_floating_point() or logits_NV.dtype.itemsize > 4:
        raise ValueError(f"score: logits are {logits_NV.dtype}; give float32, bfloat16 or float16")
    return logits_NV.detach(), labels_N.detach()
