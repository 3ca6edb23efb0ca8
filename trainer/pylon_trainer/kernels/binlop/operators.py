"""The kernels as operators of PyTorch, which compiled code calls without looking inside.

Shapes: any, alike for gate, up and y.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("pylon::binlop_gated", mutates_args=())
def gated(gate: Tensor, up: Tensor, coefficients_4: Tensor) -> Tensor:
    """As `reference.gated`; CUDA only."""
    from pylon_trainer.kernels.binlop import triton as fused

    return fused.gated(gate, up, coefficients_4)


@torch.library.custom_op("pylon::binlop_gated_backward", mutates_args=())
def gated_backward(d_y: Tensor, gate: Tensor, y: Tensor, coefficients_4: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.gated_backward`; CUDA only."""
    from pylon_trainer.kernels.binlop import triton as fused

    return fused.gated_backward(d_y, gate, y, coefficients_4)


@gated.register_fake
def _(gate: Tensor, up: Tensor, coefficients_4: Tensor) -> Tensor:  # noqa: ARG001
    return gate.new_empty(gate.shape)


@gated_backward.register_fake
def _(d_y: Tensor, gate: Tensor, y: Tensor, coefficients_4: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape), torch.empty_like(coefficients_4)
