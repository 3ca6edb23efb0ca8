"""What the mixers of this architecture share: two projections, and between them a short convolution and a gated norm.

All that lies between the two projections is `run`, which needs the first projection's output and nothing else. So
training holds that output and run's own, and computes what lies between again on the way back (models/recompute.py).

Shapes: B sequences, T tokens, D hidden width, I width of the first projection, O inner width, U channels of the
convolution, W tokens that it sees, G groups of channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pylon_trainer.models.context import Context, Mixer
from pylon_trainer.models.decoder import plain_linear
from pylon_trainer.models.ports import Port


class StateMixer(Mixer):
    """A mixer between its two projections."""

    skip: Tensor
    """H: share of each head's values that passes by the state."""

    def __init__(self, hidden_size: int, projected: int, inner: int) -> None:
        super().__init__()
        self.input = plain_linear(hidden_size, projected)
        self.output = plain_linear(inner, hidden_size)
        self.port_skip: Port | None = None

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        (projected_BTI,) = self.offers(x_BTD, context)
        return context.linear(self.output, context.mix(self, projected_BTI))

    def offers(self, x_BTD: Tensor, context: Context) -> tuple[Tensor]:
        """What tokens offer to later ones, B x T x I."""
        return (context.linear(self.input, x_BTD),)


class ShortConvolution(nn.Module):
    """Each channel's weighted sum over a token and the W - 1 before it in its document."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)  # as torch initialises a convolution
        self.weight = nn.Parameter(torch.empty(channels, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    def forward(
        self, x_BTU: Tensor, starts_BT: Tensor | None = None, recent_BWU: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The sums, in x's type, and the last W - 1 inputs; recent_BWU: those of the tokens before, None is zero."""
        tokens, before = x_BTU.shape[1], self.weight.shape[1] - 1
        # Shifted sums instead of conv1d: one pass over memory when compiled, and a document's start is but a mask.
        padded = F.pad(x_BTU, (0, 0, before, 0)) if recent_BWU is None else torch.cat((recent_BWU, x_BTU), 1)
        sums_BTU = self.bias + self.weight[:, before] * x_BTU
        for lag in range(1, before + 1):
            shifted_BTU = padded[:, before - lag : before - lag + tokens]
            if starts_BT is not None:
                is_own_BT = torch.arange(tokens, device=x_BTU.device) - lag >= starts_BT
                shifted_BTU = torch.where(is_own_BT.unsqueeze(-1), shifted_BTU, 0.0)
            sums_BTU = sums_BTU + self.weight[:, before - lag] * shifted_BTU
        return sums_BTU.to(x_BTU.dtype), padded[:, tokens:]


def gated_norm(y_BTO: Tensor, gate_BTO: Tensor, weight_O: Tensor, groups: int, epsilon: float) -> Tensor:
    """RMS norm by groups of y * silu(gate), in the gate's type."""
    gated_BTGO = (y_BTO.float() * F.silu(gate_BTO.float())).unflatten(-1, (groups, -1))
    normed_BTGO = gated_BTGO * torch.rsqrt(gated_BTGO.square().mean(-1, keepdim=True) + epsilon)
    normed_BTO: Tensor = weight_O * normed_BTGO.flatten(-2)
    return normed_BTO.to(gate_BTO.dtype)
