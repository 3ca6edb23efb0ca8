"""The kernels as operators of PyTorch, which compiled code calls without looking inside, and their gradient.

Shapes: as in `kernels.gated_norm`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("pylon::gated_norm", mutates_args=())
def gated_norm(
    y_BTO: Tensor,
    values_BTO: Tensor,
    skip_H: Tensor,
    gate_BTO: Tensor,
    weight_O: Tensor,
    groups: int,
    epsilon: float,
) -> Tensor:
    """As `reference.gated_norm`."""
    from pylon_trainer.kernels.gated_norm import triton as fused

    return fused.gated_norm(y_BTO, values_BTO, skip_H, gate_BTO, weight_O, groups, epsilon)


@torch.library.custom_op("pylon::gated_norm_backward", mutates_args=())
def _gated_norm_backward(
    d_normed_BTO: Tensor,
    y_BTO: Tensor,
    values_BTO: Tensor,
    skip_H: Tensor,
    gate_BTO: Tensor,
    weight_O: Tensor,
    groups: int,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of y, values, skip, gate and weight."""
    from pylon_trainer.kernels.gated_norm import triton as fused

    return fused.gated_norm_backward(d_normed_BTO, y_BTO, values_BTO, skip_H, gate_BTO, weight_O, groups, epsilon)


@gated_norm.register_fake
def _(
    y_BTO: Tensor,  # noqa: ARG001
    values_BTO: Tensor,  # noqa: ARG001
    skip_H: Tensor,  # noqa: ARG001
    gate_BTO: Tensor,
    weight_O: Tensor,  # noqa: ARG001
    groups: int,  # noqa: ARG001
    epsilon: float,  # noqa: ARG001
) -> Tensor:
    return gate_BTO.new_empty(gate_BTO.shape)


@_gated_norm_backward.register_fake
def _(
    d_normed_BTO: Tensor,  # noqa: ARG001
    y_BTO: Tensor,
    values_BTO: Tensor,
    skip_H: Tensor,
    gate_BTO: Tensor,
    weight_O: Tensor,
    groups: int,  # noqa: ARG001
    epsilon: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_y, d_values, d_skip, d_gate, d_weight = (
        x.new_empty(x.shape) for x in (y_BTO, values_BTO, skip_H, gate_BTO, weight_O)
    )
    return d_y, d_values, d_skip, d_gate, d_weight


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    *tensors, ctx.groups, ctx.epsilon = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, d_normed_BTO: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _gated_norm_backward(d_normed_BTO, *ctx.saved_tensors, ctx.groups, ctx.epsilon)
    return *gradients, None, None


gated_norm.register_autograd(_backward, setup_context=_save)
