"""Buckets by rank through a sort: the definition that the linear-time kernel is held to.

Shapes: N scores, B borders between B + 1 buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Buckets:
    """Where each score falls when all are ranked from highest to lowest; of equal scores the earlier ranks higher."""

    bucket_N: Tensor
    """int32: 0 holds the highest scores."""
    thresholds_B: Tensor
    """float32: lowest score that is still above border b."""


def bucket(scores_N: Tensor, ends: Sequence[int]) -> Buckets:
    """Ranks 0 to ends[0] - 1 go to bucket 0, those up to ends[1] - 1 to bucket 1, the rest to bucket B."""
    ranked_N, order_N = torch.sort(scores_N, descending=True, stable=True)
    rank_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=order_N.device))
    ends_B = torch.tensor(ends, dtype=torch.int64, device=scores_N.device)
    return Buckets(torch.searchsorted(ends_B, rank_N, right=True).int(), ranked_N[ends_B - 1])
