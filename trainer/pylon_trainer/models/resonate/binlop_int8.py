"""BiNLOP on int8, in integers alone: the same bits on every machine.

A slope between a half and one would round to 0 or 1 as an integer, so each line is a fixed-point multiplier and offset
with one shift for all (Jacob et al. 2018, arXiv:1712.05877, section 2.2): for a magnitude q of input,

    (multiplier * q + offset + 2^(shift - 1)) >> shift

rounds half away from zero, as the sign comes back afterwards, and saturates at 127. Products and sums fit into int32.
Scales are symmetric: a real number is its scale times its integer, -127 to 127 (-128 is read, never written).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 127
MULTIPLIER_BITS = 15
"""Of the largest multiplier: with 8 bits of input 23, an offset as large, and 8 to spare."""
LARGEST_SHIFT = 30


@dataclass(frozen=True)
class Int8Binlop:
    """The activation between an input scale and an output scale."""

    knees: tuple[int, int]
    """The last magnitudes on the first and on the second line."""
    multipliers: tuple[int, int, int]
    offsets: tuple[int, int, int]
    shift: int

    @classmethod
    def of(cls, coefficients_4: Tensor, input_scale: float, output_scale: float) -> Int8Binlop:
        """coefficients_4: k1, k2, g1, g2. Raises ValueError for scales that int8 cannot be carried between."""
        if not (input_scale > 0 and output_scale > 0 and 0 < (ratio := input_scale / output_scale) < 2**14):
            raise ValueError(
                f"BiNLOP in int8: from scale {input_scale} to {output_scale}; both must be positive and the first "
                f"less than {2**14} times the second"
            )
        k1, k2, g1, g2 = coefficients_4.double().tolist()
        # Knees beyond all inputs matter to none, and would ask for offsets of any size.
        k1, k2 = (min(knee, (LARGEST + 1) * input_scale) for knee in (k1, k2))
        offset1 = k1 * (1 - g1)
        offset2 = offset1 + k2 * (g1 - g2)
        shift = min(MULTIPLIER_BITS - 1 - math.floor(math.log2(ratio)), LARGEST_SHIFT)
        one = 1 << shift
        return cls(
            knees=(math.floor(k1 / input_scale), math.floor(k2 / input_scale)),
            multipliers=(round(ratio * one), round(g1 * ratio * one), round(g2 * ratio * one)),
            offsets=(0, round(offset1 / output_scale * one), round(offset2 / output_scale * one)),
            shift=shift,
        )

    def __call__(self, q: Tensor) -> Tensor:
        """int8 to int8."""
        magnitude = q.int().abs()
        line = (magnitude > self.knees[0]).long() + (magnitude > self.knees[1])
        multiplier, offset = (torch.tensor(x, device=q.device).int()[line] for x in (self.multipliers, self.offsets))
        half = 1 << self.shift >> 1
        bent = (multiplier * magnitude + offset + half) >> self.shift
        return (bent.clamp_max(LARGEST) * q.int().sign()).to(torch.int8)

    def error_bound(self) -> float:
        """How far the output, in units of its scale, may be from the real one within -127 to 127: half of a unit, and
        what multiplier and offset lost to rounding."""
        return 0.5 + (0.5 * (LARGEST + 1) + 0.5) / (1 << self.shift)
