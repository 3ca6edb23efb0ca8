"""The kernels as operators of PyTorch, which compiled code calls without looking inside, and their gradient.

Shapes: as in `kernels.convolution`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("pylon::convolution", mutates_args=())
def convolve(
    x_BTU: Tensor, weight_UW: Tensor, bias_U: Tensor, starts_BT: Tensor | None, recent_BVU: Tensor | None
) -> Tensor:
    """As `reference.convolve`."""
    from pylon_trainer.kernels.convolution import triton as fused

    return fused.convolve(x_BTU, weight_UW, bias_U, starts_BT, recent_BVU)


@torch.library.custom_op("pylon::convolution_backward", mutates_args=())
def _convolve_backward(
    d_y_BTU: Tensor,
    x_BTU: Tensor,
    weight_UW: Tensor,
    bias_U: Tensor,
    starts_BT: Tensor | None,
    recent_BVU: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and of the recent inputs, also where those are not given."""
    from pylon_trainer.kernels.convolution import triton as fused

    return fused.convolve_backward(d_y_BTU, x_BTU, weight_UW, bias_U, starts_BT, recent_BVU)


@convolve.register_fake
def _(
    x_BTU: Tensor,
    weight_UW: Tensor,  # noqa: ARG001
    bias_U: Tensor,  # noqa: ARG001
    starts_BT: Tensor | None,  # noqa: ARG001
    recent_BVU: Tensor | None,  # noqa: ARG001
) -> Tensor:
    return x_BTU.new_empty(x_BTU.shape)


@_convolve_backward.register_fake
def _(
    d_y_BTU: Tensor,  # noqa: ARG001
    x_BTU: Tensor,
    weight_UW: Tensor,
    bias_U: Tensor,
    starts_BT: Tensor | None,  # noqa: ARG001
    recent_BVU: Tensor | None,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, _, U = x_BTU.shape
    d_recent_BVU = x_BTU.new_empty(B, weight_UW.shape[1] - 1, U)
    return x_BTU.new_empty(x_BTU.shape), weight_UW.new_empty(weight_UW.shape), torch.empty_like(bias_U), d_recent_BVU


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, d_y_BTU: Tensor) -> tuple[Tensor | None, ...]:
    *_, recent_BVU = ctx.saved_tensors
    d_x, d_weight, d_bias, d_recent = _convolve_backward(d_y_BTU, *ctx.saved_tensors)
    return d_x, d_weight, d_bias, None, None if recent_BVU is None else d_recent.to(recent_BVU.dtype)


convolve.register_autograd(_backward, setup_context=_save)
