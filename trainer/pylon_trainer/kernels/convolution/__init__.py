"""A short causal convolution of every channel by itself, and SiLU of it: what feeds a state-space layer.

Written as shifted sums, it is compiled into several passes over memory each way; as a kernel it is one, which holds
nothing for the way back but its inputs: what SiLU is applied to is computed again.

Shapes: B sequences, T tokens, U channels, W tokens that the convolution sees, V = W - 1 of them before a token itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pylon_trainer.kernels.convolution import operators, reference

__all__ = ["convolve"]


def convolve(
    x_BTU: Tensor,
    weight_UW: Tensor,
    bias_U: Tensor,
    *,
    starts_BT: Tensor | None = None,
    recent_BVU: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """silu(bias_u + sum over w of weight_uw * x_{t - V + w, u}) in the type of x, and the last V inputs.

    x: strided as one likes. starts_BT: first token of each token's document; those before it count as 0.
    recent_BVU: the V inputs before the first, None is 0. Gradients reach all but starts. Sums are of the type of the
    weights, on CUDA float32 whatever that is, and there the same input gives the same bits.

    Raises ValueError when shapes do not fit, and for float64 on CUDA.
    """
    (B, _, U), V = x_BTU.shape, weight_UW.shape[1] - 1
    recent_shape = (B, V, U) if recent_BVU is None else tuple(recent_BVU.shape)
    if weight_UW.shape[0] != U or bias_U.shape != (U,) or recent_shape != (B, V, U):
        raise ValueError(
            f"convolution: x {tuple(x_BTU.shape)}, weight {tuple(weight_UW.shape)}, bias {tuple(bias_U.shape)} and "
            f"recent inputs {recent_shape} must be (B, T, U), (U, W), (U,) and (B, W - 1, U)"
        )
    if x_BTU.is_cuda and x_BTU.itemsize > 4:
        raise ValueError(f"convolution: x is {x_BTU.dtype}; give float32, bfloat16 or float16")
    # Elsewhere PyTorch's own operations, which a compiled block fuses with what surrounds them.
    run = operators.convolve if x_BTU.is_cuda else reference.convolve
    y_BTU: Tensor = run(x_BTU, weight_UW, bias_U, starts_BT, recent_BVU)
    return y_BTU, _latest(x_BTU, recent_BVU, V)


def _latest(x_BTU: Tensor, recent_BVU: Tensor | None, V: int) -> Tensor:
    """The last V inputs, with a memory of their own: x may be part of something large."""
    tokens = x_BTU.shape[1]
    if tokens >= V:
        return x_BTU[:, tokens - V :].clone()
    earlier = x_BTU.new_zeros(len(x_BTU), V - tokens, x_BTU.shape[2]) if recent_BVU is None else recent_BVU[:, tokens:]
    return torch.cat((earlier, x_BTU), 1)
