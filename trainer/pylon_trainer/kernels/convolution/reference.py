"""The convolution in plain PyTorch: the definition that the kernels are held to.

Shapes: B sequences, T tokens, U channels, W tokens that the convolution sees, V = W - 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def convolve(
    x_BTU: Tensor, weight_UW: Tensor, bias_U: Tensor, starts_BT: Tensor | None, recent_BVU: Tensor | None
) -> Tensor:
    """As `kernels.convolution.convolve`, without the last inputs."""
    tokens, before = x_BTU.shape[1], weight_UW.shape[1] - 1
    # Shifted sums instead of conv1d: a document's start is but a mask.
    padded = F.pad(x_BTU, (0, 0, before, 0)) if recent_BVU is None else torch.cat((recent_BVU, x_BTU), 1)
    sums_BTU = bias_U + weight_UW[:, before] * x_BTU
    for lag in range(1, before + 1):
        shifted_BTU = padded[:, before - lag : before - lag + tokens]
        if starts_BT is not None:
            is_own_BT = torch.arange(tokens, device=x_BTU.device) - lag >= starts_BT
            shifted_BTU = torch.where(is_own_BT.unsqueeze(-1), shifted_BTU, 0.0)
        sums_BTU = sums_BTU + weight_UW[:, before - lag] * shifted_BTU
    return F.silu(sums_BTU.to(x_BTU.dtype))
