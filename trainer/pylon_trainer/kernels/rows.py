"""How rows of numbers must lie in memory for kernels that load them."""

from __future__ import annotations

import math

from torch import Tensor


def side_by_side(x: Tensor) -> Tensor:
    """With the numbers of its last dim next to each other: x itself, or else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def row_unit(width: int, *strides: int) -> int:
    """Elements, at most 16, that all rows begin at multiples of. The compiler is told, or it could not load several at
    once."""
    return math.gcd(16, width, *strides)
