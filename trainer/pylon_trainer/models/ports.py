"""Ports: the few shallow places of a block where the controller's advice, the resonance vector, may enter.

Two or three to a block. The first shifts and scales what the MLP reads (FiLM: Perez et al. 2018, arXiv:1709.07871),
the second opens or closes a state-space layer's skip, head by head, the third shifts what a hyper-network makes of its
summary. A port is a product of two thin matrices of which the second is zero at first, so that a model with ports
begins as the one without. Advice comes by the context, as a constant: nothing here keeps it, changes it or sends a
gradient to whoever gave it.

Each kind of port has a row of its own, all alike while training, so that one kind can be asked what it does alone.

Shapes: P kinds of ports, R size of the advice, C channels of the thin middle, B sequences, T tokens, D hidden width.
"""

from __future__ import annotations

import enum
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from pylon_trainer.models.context import Context

CHANNELS = 8
"""C: what a port makes of the advice before it acts. At R = 512 and D = 768 a block's ports then have 0.2 % of its
parameters; a full matrix would have a tenth."""


class PortKind(enum.IntEnum):
    """Rows of the advice."""

    MLP = 0
    SKIP = 1
    HYPER = 2


class Port(nn.Module):
    """Advice to `outputs` numbers, all zero at first."""

    def __init__(self, kind: PortKind, advice_size: int, outputs: int) -> None:
        super().__init__()
        self.kind = int(kind)
        self.read = nn.Parameter(torch.randn(CHANNELS, advice_size) / math.sqrt(advice_size))
        self.write = nn.Parameter(torch.zeros(outputs, CHANNELS))

    def forward(self, advice_PR: Tensor) -> Tensor:
        # Sums of products: a few thousand numbers, which autocast would round if they were called a matrix product.
        channels_C = (self.read * advice_PR[self.kind]).sum(-1)
        outputs: Tensor = (self.write * channels_C).sum(-1)
        return outputs


def norm_with(norm: nn.RMSNorm, port: Port | None, x_BTD: Tensor, context: Context) -> Tensor:
    """The norm of x, scaled and shifted as the port says. It scales the norm's weight, which holds no more memory."""
    if port is None or context.advice_PR is None:
        normed_BTD: Tensor = norm(x_BTD)
        return normed_BTD
    scale_D, shift_D = port(context.advice_PR).chunk(2)
    scaled_BTD = F.rms_norm(x_BTD, norm.normalized_shape, norm.weight * (1 + scale_D), norm.eps)
    modulated_BTD: Tensor = scaled_BTD + shift_D
    return modulated_BTD


def skip_with(skip_H: Tensor, port: Port | None, advice_PR: Tensor | None) -> Tensor:
    """A skip's weights, each times a number between 0 and 2."""
    if port is None or advice_PR is None:
        return skip_H
    gate_H: Tensor = port(advice_PR)
    return skip_H * (1 + gate_H.tanh())
