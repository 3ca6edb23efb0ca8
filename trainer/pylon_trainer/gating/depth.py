"""Depth: how many blocks a chosen row's gradient goes back over, by the row's rank.

Of n buckets of rows, hardest first, bucket b goes back over the upper (n - b) / n of the blocks and leaves; rows that
left are gathered out, so the cost falls with them. Of those that would leave, a drawn share, `leak_rate`, goes on to
the bottom with a weight of 1 / share: then the gradient below estimates the full-depth one without bias. At 0 they all
leave, and it does not. How many leave where follows from shapes alone; which, only the device knows.

Shapes: K chosen rows, M of them that have not left yet, R of those that stay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Narrowing:
    """What is left of M rows at some block."""

    kept_R: Tensor
    """Rising positions among them."""
    weights_R: Tensor
    """float32, of each kept row's gradient."""

    def carry(self, gradient_1MD: Tensor) -> Tensor:
        """The gradient that goes on, 1 x R x D."""
        return gradient_1MD.index_select(1, self.kept_R) * self.weights_R[:, None]

    def then(self, other: Narrowing) -> Narrowing:
        """Both, one after the other."""
        return Narrowing(self.kept_R[other.kept_R], self.weights_R[other.kept_R] * other.weights_R)


@dataclass(frozen=True)
class Depth:
    """Depths for the rows of one micro-batch."""

    ranks_K: Tensor
    """int64, each of 0 to K - 1 once, in the order of the rows; 0 is the hardest."""
    buckets: int
    opened: int
    """Number of the last bucket that leaves where it should; later ones leave with it. Warm-up raises it from 0, where
    all rows go to the bottom, to buckets - 1."""
    leak_rate: float
    start: float | Tensor
    """Where in [0, 1) the systematic draw of the leaks starts."""

    def narrowings(self, layers: int) -> dict[int, Narrowing]:
        """By the number of blocks gone back over: who goes on from there."""
        ranks_M, rows, leaked = self.ranks_K, len(self.ranks_K), 0
        found: dict[int, Narrowing] = {}
        for bucket in range(self.opened, 0, -1):
            first = -(-bucket * rows // self.buckets)
            leaving = len(ranks_M) - leaked - first
            leaking = math.ceil(self.leak_rate * leaving)  # one at least, or the gradient below would be biased
            order_M = ranks_M.argsort()
            drawn = order_M[leaked + first :][_systematic(leaving, leaking, self.start, ranks_M.device)]
            # Leaked rows rank before all others from here on, and so never leave.
            ranks_M = ranks_M.index_fill(0, drawn, -1)
            weights_M = torch.ones_like(ranks_M, dtype=torch.float32)
            weights_M.index_fill_(0, drawn, leaving / max(leaking, 1))
            kept_R = torch.cat((order_M[: leaked + first], drawn)).sort().values
            narrowing = Narrowing(kept_R, weights_M[kept_R])
            over = blocks_over(layers, self.buckets, bucket)
            found[over] = found[over].then(narrowing) if over in found else narrowing
            ranks_M, leaked = ranks_M[kept_R], leaked + leaking
        return found


def blocks_over(layers: int, buckets: int, bucket: int) -> int:
    """Blocks that the gradient of a bucket's rows goes back over: the upper (buckets - bucket) / buckets, at least
    one."""
    return max(1, layers * (buckets - bucket) // buckets)


def _systematic(population: int, draws: int, start: float | Tensor, device: torch.device) -> Tensor:
    """Distinct positions, each as probable as any other (Madow 1949)."""
    pointers = torch.arange(draws, device=device, dtype=torch.float64) + start
    return (pointers * (population / max(draws, 1))).long()
