"""The gated product of BiNLOP, each way in one pass over memory.

Forward reads gate and up and writes y. Backward reads the gradient of y, gate and y, and writes the gradients of gate
and up; every program also sums what the four coefficients receive over its tile, and a second, small sum joins the
tiles. The order of every sum depends on the shapes alone: the same input gives the same bits.

Shapes: N elements, P programs of BLOCK elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pylon_trainer.kernels.binlop import reference

BLOCK, WARPS = 4096, 8
SMALLEST = tl.constexpr(reference.SMALLEST)


@triton.jit
def _factor(x, k1, k2, g1, g2):
    """What `up` is multiplied by, and its slope."""
    magnitude = tl.abs(x)
    offset1 = k1 * (1 - g1)
    offset2 = offset1 + k2 * (g1 - g2)
    slope = tl.where(magnitude <= k1, 1.0, tl.where(magnitude <= k2, g1, g2))
    offset = tl.where(magnitude <= k1, 0.0, tl.where(magnitude <= k2, offset1, offset2))
    bent = slope * x + tl.where(x < 0, -offset, offset)
    return tl.where(magnitude < SMALLEST, SMALLEST, bent), slope


@triton.jit
def _add_four(a1, a2, a3, a4, b1, b2, b3, b4):
    return a1 + b1, a2 + b2, a3 + b3, a4 + b4


@triton.jit
def _forward_kernel(gate_N, up_N, coefficients_4, y_N, N, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    k1, k2 = tl.load(coefficients_4), tl.load(coefficients_4 + 1)
    g1, g2 = tl.load(coefficients_4 + 2), tl.load(coefficients_4 + 3)
    gate = tl.load(gate_N + n, mask=inside, other=0.0)
    factor, _ = _factor(gate.to(tl.float32), k1, k2, g1, g2)
    y = factor * tl.load(up_N + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_N + n, y.to(gate.dtype), mask=inside)


@triton.jit
def _backward_kernel(
    d_y_N, gate_N, y_N, coefficients_4, d_gate_N, d_up_N, sums_P4, N, BLOCK: tl.constexpr
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    k1, k2 = tl.load(coefficients_4), tl.load(coefficients_4 + 1)
    g1, g2 = tl.load(coefficients_4 + 2), tl.load(coefficients_4 + 3)
    gate = tl.load(gate_N + n, mask=inside, other=0.0)
    d_y = tl.load(d_y_N + n, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_N + n, mask=inside, other=0.0).to(tl.float32)
    x = gate.to(tl.float32)
    factor, slope = _factor(x, k1, k2, g1, g2)
    d_factor = d_y * (y / factor)
    tl.store(d_gate_N + n, (d_factor * slope).to(gate.dtype), mask=inside)
    tl.store(d_up_N + n, (d_y * factor).to(gate.dtype), mask=inside)

    magnitude, outward = tl.abs(x), tl.where(x < 0, -d_factor, d_factor)
    within1, within2 = tl.minimum(magnitude, k1), tl.minimum(magnitude, k2)
    over1, over2, between, beyond = tl.reduce(
        (
            tl.where(magnitude > k1, outward, 0.0),
            tl.where(magnitude > k2, outward, 0.0),
            outward * (within2 - within1),
            outward * (magnitude - within2),
        ),
        0,
        _add_four,
    )
    sums_4 = sums_P4 + tl.program_id(0).to(tl.int64) * 4
    tl.store(sums_4, (1 - g1) * over1)
    tl.store(sums_4 + 1, (g1 - g2) * over2)
    tl.store(sums_4 + 2, between)
    tl.store(sums_4 + 3, beyond)


def gated(gate: Tensor, up: Tensor, coefficients_4: Tensor) -> Tensor:
    """As `reference.gated`, in one pass."""
    gate, up = gate.contiguous(), up.contiguous()
    y, count = torch.empty_like(gate), gate.numel()
    if count:
        _forward_kernel[(triton.cdiv(count, BLOCK),)](
            gate, up, coefficients_4.contiguous(), y, count, BLOCK=BLOCK, num_warps=WARPS
        )
    return y


def gated_backward(d_y: Tensor, gate: Tensor, y: Tensor, coefficients_4: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.gated_backward`, in one pass."""
    d_y, gate, y = d_y.contiguous(), gate.contiguous(), y.contiguous()
    d_gate, d_up, count = torch.empty_like(gate), torch.empty_like(gate), gate.numel()
    programs = triton.cdiv(count, BLOCK)
    sums_P4 = gate.new_empty((programs, 4), dtype=torch.float32)
    if count:
        _backward_kernel[(programs,)](
            d_y, gate, y, coefficients_4.contiguous(), d_gate, d_up, sums_P4, count, BLOCK=BLOCK, num_warps=WARPS
        )
    return d_gate, d_up, sums_P4.sum(0).to(coefficients_4.dtype)
