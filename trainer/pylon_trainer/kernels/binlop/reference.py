"""BiNLOP and its gated product in plain PyTorch: the definition that the kernels are held to.

Shapes: any, alike for gate, up and y.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST = 2.0**-64
"""What a gate nearer to 0 counts as, so that `up` can be read off the product. Its square is in range of bfloat16 and
float32 too, so no `up` that is not as small is lost."""


class Lines(NamedTuple):
    """The straight line that each magnitude lies on: slope * magnitude + offset."""

    slope: Tensor
    offset: Tensor


def lines(magnitudes: Tensor, coefficients_4: Tensor) -> Lines:
    """Of magnitudes (>= 0) of inputs; coefficients_4: k1, k2, g1, g2."""
    k1, k2, g1, g2 = coefficients_4.unbind()
    offset1 = k1 * (1 - g1)
    offset2 = offset1 + k2 * (g1 - g2)
    slope = torch.where(magnitudes <= k1, 1.0, torch.where(magnitudes <= k2, g1, g2))
    offset = torch.where(magnitudes <= k1, 0.0, torch.where(magnitudes <= k2, offset1, offset2))
    return Lines(slope, offset)


def bend(x: Tensor, coefficients_4: Tensor) -> Tensor:
    """The activation, with gradients by autograd."""
    slope, offset = lines(x.abs(), coefficients_4)
    return slope * x + offset * x.sign()


def gated(gate: Tensor, up: Tensor, coefficients_4: Tensor) -> Tensor:
    """bend(gate) * up, computed in float32 at least, in the gate's type."""
    return (_factor(_wide(gate), coefficients_4) * up).to(gate.dtype)


def gated_backward(d_y: Tensor, gate: Tensor, y: Tensor, coefficients_4: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate, up and coefficients from the product y, in which `up` is found by division."""
    k1, k2, g1, g2 = coefficients_4.unbind()
    x, d_y_wide = _wide(gate), _wide(d_y)
    magnitude, sign = x.abs(), torch.where(x < 0, -1.0, 1.0)
    factor = _factor(x, coefficients_4)
    d_factor = d_y_wide * (y / factor)
    outward = d_factor * sign
    within1, within2 = magnitude.minimum(k1), magnitude.minimum(k2)
    d_coefficients = torch.stack(
        (
            (1 - g1) * torch.where(magnitude > k1, outward, 0.0).sum(),
            (g1 - g2) * torch.where(magnitude > k2, outward, 0.0).sum(),
            (outward * (within2 - within1)).sum(),
            (outward * (magnitude - within2)).sum(),
        )
    )
    d_gate = d_factor * lines(magnitude, coefficients_4).slope
    return d_gate.to(gate.dtype), (d_y_wide * factor).to(gate.dtype), d_coefficients.to(coefficients_4.dtype)


def _factor(x: Tensor, coefficients_4: Tensor) -> Tensor:
    """What `up` is multiplied by: bend(x), kept away from 0."""
    return torch.where(x.abs() < SMALLEST, SMALLEST, bend(x, coefficients_4))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
