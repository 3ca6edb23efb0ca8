"""BiNLOP of a gate, times what it gates: the inside of a gated MLP, with a way back that holds nothing of its own.

The way back needs the gate and `up`. `up` is not held: the product y is, because the layer that multiplies it next
holds it anyway, and up = y / bend(gate), to the last digit of y or so, as bend(gate) is 0 for no gate but 0. A gate
nearer to 0 than SMALLEST counts as SMALLEST for that. So of an MLP's inner tensors two live on, gate and y, where a
compiled SiLU has three, up as well, and an eager one four. Backward moves no byte more for it. Inverting the activation
instead would save nothing here: two numbers go into the product, so two must stay.

Shapes: any, alike for gate, up and y.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pylon_trainer.kernels.binlop import operators, reference
from pylon_trainer.kernels.binlop.reference import bend, lines

__all__ = ["bend", "gated", "lines"]


def gated(gate: Tensor, up: Tensor, coefficients_4: Tensor) -> Tensor:
    """bend(gate) * up in their type, with gradients for all three (models/resonate/binlop.py says what bend is).

    gate, up: of one shape and type, float32, bfloat16 or, but on CUDA, float64. coefficients_4: k1, k2, g1, g2 with
    0 < k1 < k2 and 1 >= g1 >= g2 > 0, which is not checked. On CUDA the same input gives the same bits.

    Raises ValueError when shapes or types do not fit; float16 has too few exponents to divide y back.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype or coefficients_4.shape != (4,):
        raise ValueError(
            f"binlop: gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} must be alike, "
            f"coefficients {tuple(coefficients_4.shape)} must be (4,)"
        )
    if gate.dtype not in (torch.float32, torch.bfloat16, torch.float64) or (gate.is_cuda and gate.itemsize > 4):
        raise ValueError(f"binlop: gate and up are {gate.dtype}; give float32 or bfloat16")
    y: Tensor = _Gated.apply(gate, up, coefficients_4)
    return y


class _Gated(Function):
    @staticmethod
    def forward(gate: Tensor, up: Tensor, coefficients_4: Tensor) -> Tensor:
        # Elsewhere PyTorch's own operations, which a compiled block fuses with what surrounds them.
        y: Tensor = (operators if gate.is_cuda else reference).gated(gate, up, coefficients_4)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        gate, _, coefficients_4 = inputs
        ctx.save_for_backward(gate, output, coefficients_4)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, y, coefficients_4 = ctx.saved_tensors
        received: tuple[Tensor, Tensor, Tensor] = (operators if gate.is_cuda else reference).gated_backward(
            gradients[0], gate, y, coefficients_4
        )
        return received
