"""BiNLOP: an odd activation of straight lines with two knees, whose knees and slopes are learnt.

With 0 < k1 < k2 and 1 >= g1 >= g2 >= the least slope allowed, a magnitude r = |x| becomes

    r                                     up to k1
    k1 + g1 (r - k1)                      up to k2
    k1 + g1 (k2 - k1) + g2 (r - k2)       from there on

and x keeps its sign. It neither saturates nor amplifies: a block's Jacobian shrinks by the least slope at most. It is
a bijection, so it has an inverse and a log-determinant. One set of four numbers serves a layer. They come from raw
parameters that may take any value, so no update can break the order.

Shapes: any, E the last dimension.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pylon_trainer.kernels.binlop import bend, gated, lines

LEAST_KNEE, LEAST_GAP = 1e-3, 1e-3
"""k1, and (k2 - k1) / k1, are more than these."""
KNEES = (0.5, 1.5)
"""At first. Slopes start half-way: g1 between 1 and the least, g2 between g1 and the least."""


class Binlop(nn.Module):
    """The activation of one layer, called as its MLP calls it: on the gate and what it gates."""

    def __init__(self, minimum_slope: float) -> None:
        super().__init__()
        self.minimum_slope = minimum_slope
        k1, k2 = KNEES
        raw = [_softplus_inverse(k1 - LEAST_KNEE), _softplus_inverse(k2 / k1 - 1 - LEAST_GAP)]
        self.raw_knees = nn.Parameter(torch.tensor(raw))
        self.raw_slopes = nn.Parameter(torch.zeros(2))

    def coefficients(self) -> Tensor:
        """k1, k2, g1, g2, whatever the raw parameters are."""
        first, gap = F.softplus(self.raw_knees).unbind()
        k1 = LEAST_KNEE + first
        k2 = k1 * (1 + LEAST_GAP + gap)
        share1, share2 = torch.sigmoid(self.raw_slopes).unbind()
        least = torch.full_like(share1, self.minimum_slope)
        g1 = least.lerp(torch.ones_like(share1), share1)  # exact at both ends, so that rounding leaves the order
        g2 = least.lerp(g1, share2)
        return torch.stack((k1, k2, g1, g2))

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """The activation of the gate, times up."""
        return gated(gate, up, self.coefficients())

    def bend(self, x: Tensor) -> Tensor:
        """The activation itself."""
        return bend(x, self.coefficients()).to(x.dtype)

    def inverse(self, y: Tensor) -> Tensor:
        """The x that becomes y: lines again, with the knees' images for knees and steeper slopes."""
        k1, k2, g1, g2 = self.coefficients().unbind()
        return bend(y, torch.stack((k1, k1 + g1 * (k2 - k1), 1 / g1, 1 / g2))).to(y.dtype)

    def log_determinant(self, x_E: Tensor) -> Tensor:
        """Logarithm of the determinant of the activation's Jacobian at vectors ... x E, one for each: ... of x."""
        return lines(x_E.abs(), self.coefficients()).slope.log().sum(-1)


def _softplus_inverse(x: float) -> float:
    return math.log(math.expm1(x))
