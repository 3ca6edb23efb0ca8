"""Buckets of scores by rank in linear time: quantiles, top k, strata; ties broken by index.

Refuses to sort, and to wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from pylon_trainer.kernels.bucket import reference
from pylon_trainer.kernels.bucket.reference import Buckets

__all__ = ["Buckets", "bucket"]


def bucket(scores_N: Tensor, ends: Sequence[int]) -> Buckets:
    """Cut scores, ranked from highest to lowest, at the given ranks: ends (k,) makes bucket 0 the top k.

    scores_N: float32; NaN ranks above everything, -0 equals 0, of equal scores the earlier ranks higher. ends: rising
    numbers of rows, each in 1 to N; rows past the last fall into bucket len(ends).

    Raises ValueError when scores or ends do not fit.
    """
    if scores_N.ndim != 1 or scores_N.dtype != torch.float32:
        raise ValueError(f"bucket: scores are {scores_N.dtype} {tuple(scores_N.shape)}; give float32 (N,)")
    ends = tuple(ends)
    if any(not 0 < end <= len(scores_N) for end in ends) or any(a >= b for a, b in pairwise(ends)):
        raise ValueError(f"bucket: ends {ends} must rise within 1 to {len(scores_N)}, the number of scores")
    if scores_N.is_cuda:
        from pylon_trainer.kernels.bucket import triton as linear

        return linear.bucket(scores_N.detach(), ends)
    return reference.bucket(scores_N.detach(), ends)
