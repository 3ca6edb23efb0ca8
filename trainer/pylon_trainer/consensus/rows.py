"""Rows that were touched, for embeddings and codebooks: of most steps' gradients most rows are zero, or nearly so.

Each rank names its `limit` largest rows; those that any rank named are summed as int8, a scale to a row. Rows beyond
that stay where they are and go with a later step. How many were named by several ranks is not known beforehand, so
bytes vary from step to step, below what is promised, and this channel waits for the device.

Shapes: N values, R rows, W values of a row, L rows that a rank names, U rows that any rank named.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pylon_trainer.consensus import KEPT
from pylon_trainer.consensus.codecs.integers import Int8
from pylon_trainer.consensus.reduction import sum_encoded, summed_bytes
from pylon_trainer.runtime.distributed import World


class RowChannel:
    """The largest rows of each rank, over all ranks."""

    def __init__(self, world: World, rows: int, width: int, limit: int, kept_N: Tensor | None) -> None:
        """limit: L, at most R. kept_N: to begin with; without it nothing is ever kept."""
        self._world, self._rows, self._limit = world, rows, limit
        self._codec = Int8(width)
        self.name = f"SparseRows {limit} of {rows}"
        named_bytes = 4 * limit * (world.size - 1)
        union = min(rows, limit * world.size)
        self.bytes_per_step = named_bytes + summed_bytes(self._codec, union, world.size)
        self.kept_N = kept_N
        self.has_momentum = False

    def exchange(self, gradient_N: Tensor, is_skipped: Tensor) -> Tensor:
        """See Channel. Rows that nobody named have sum 0."""
        total_N = gradient_N.clone() if self.kept_N is None else gradient_N + self.kept_N
        total_RW = total_N.view(self._rows, -1)
        norm_L, row_L = torch.linalg.vector_norm(total_RW, dim=1).topk(self._limit)
        named_L = torch.where(norm_L > 0, row_L, self._rows).int()
        union_U = self._world.all_gather(named_L).unique()
        union_U = union_U[union_U < self._rows].long()
        sum_RW = torch.zeros_like(total_RW)
        if len(union_U):
            summed = sum_encoded(self._world, self._codec, total_RW[union_U])
            sum_RW[union_U], total_RW[union_U] = summed.sum_BV, summed.all_lost_BV
        if self.kept_N is not None:
            self.kept_N = torch.where(is_skipped, self.kept_N, total_RW.view(-1))
        return sum_RW.view(-1)

    def state_dict(self) -> dict[str, Any]:
        """See Channel."""
        return {} if self.kept_N is None else {KEPT: self.kept_N}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See Channel."""
        if self.kept_N is not None:
            self.kept_N.copy_(state[KEPT])


def largest_rows(width: int, limit: int, values_N: Tensor) -> Tensor:
    """N values of which only the rows of the largest norms are left."""
    values_RW = values_N.view(-1, width)
    row_L = torch.linalg.vector_norm(values_RW, dim=1).topk(limit).indices
    largest_RW = torch.zeros_like(values_RW)
    largest_RW[row_L] = values_RW[row_L]
    return largest_RW.view(-1)
