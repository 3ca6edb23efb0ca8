"""The gated norm in plain PyTorch: the definition that the kernels are held to.

Shapes: B sequences, T tokens, O channels, H heads, G groups of W channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_norm(
    y_BTO: Tensor,
    values_BTO: Tensor,
    skip_H: Tensor,
    gate_BTO: Tensor,
    weight_O: Tensor,
    groups: int,
    epsilon: float,
) -> Tensor:
    """As `kernels.gated_norm.gated_norm`."""
    skip_O = _wide(skip_H).repeat_interleave(len(weight_O) // len(skip_H))
    gated_BTO = (y_BTO + skip_O * values_BTO) * F.silu(_wide(gate_BTO))
    gated_BTGW = gated_BTO.unflatten(-1, (groups, -1))
    normed_BTGW = gated_BTGW * torch.rsqrt(gated_BTGW.square().mean(-1, keepdim=True) + epsilon)
    normed_BTO: Tensor = weight_O * normed_BTGW.flatten(-2)
    return normed_BTO.to(gate_BTO.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
