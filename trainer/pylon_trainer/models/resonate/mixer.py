"""What the mixers of this architecture share: two projections and, after the first, a short convolution.

All that lies between the two projections is `run`, which needs the first projection's output and nothing else. So
training holds that output and run's own, and computes what lies between again on the way back (models/recompute.py).

Shapes: B sequences, T tokens, D hidden width, I width of the first projection, O inner width, U channels of the
convolution, W tokens that it sees, V = W - 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pylon_trainer.kernels.convolution import convolve
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
    """SiLU of each channel's weighted sum over a token and the W - 1 before it in its document."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)  # as torch initialises a convolution
        self.weight = nn.Parameter(torch.empty(channels, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    def forward(
        self, x_BTU: Tensor, starts_BT: Tensor | None = None, recent_BVU: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """In x's type, and the last W - 1 inputs; recent_BVU: those of the tokens before, None is zero."""
        return convolve(x_BTU, self.weight, self.bias, starts_BT=starts_BT, recent_BVU=recent_BVU)
