"""The Mamba-2 mixer (Dao & Gu 2024, arXiv:2405.21060, section 7): projection, short convolution, scan, gate,
projection.

It computes what `transformers`' Mamba2Mixer does.

Shapes: B sequences, T tokens, I width of the first projection, O inner width, U channels of the convolution, W tokens
that it sees, H heads, P width of a head, G groups, N size of a state, M = G * N.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pylon_api.training import ModelSpec, ResonateSpec
from pylon_trainer.kernels.gated_norm import gated_norm
from pylon_trainer.models.context import Memory
from pylon_trainer.models.ports import skip_with
from pylon_trainer.models.resonate.kernel import scan
from pylon_trainer.models.resonate.mixer import ShortConvolution, StateMixer

POLES = (1.0, 16.0)
STEPS = (1e-3, 1e-1)
"""Ranges that poles (negated, uniform) and steps (log-uniform) are drawn from at first: the paper's own."""


class Mamba(StateMixer):
    """A selective state space: how fast it forgets, what it writes and what it reads depend on the token."""

    def __init__(self, spec: ModelSpec) -> None:
        own = spec.resonate or ResonateSpec()
        inner = own.expand * spec.hidden_size
        heads, maps = inner // own.head_width, own.groups * own.state_size
        sizes = [inner, inner + 2 * maps, heads]
        super().__init__(spec.hidden_size, sum(sizes), inner)
        self.own = own
        self.sizes = sizes
        """Of the first projection's parts: gate, channels of the convolution, steps."""
        self.parts = [inner, maps, maps]
        """Of the convolution's channels: values, write, read."""
        self.epsilon = spec.norm_epsilon
        self.convolution = ShortConvolution(sizes[1], own.conv_width)
        self.log_poles = nn.Parameter(torch.empty(heads).uniform_(*POLES).log())
        self.step_bias = nn.Parameter(_initial_steps(heads))
        self.skip = nn.Parameter(torch.ones(heads))
        self.norm_weight = nn.Parameter(torch.ones(inner))

    def run(
        self,
        x_BTI: Tensor,
        starts_BT: Tensor | None = None,
        memory: Memory | None = None,
        advice_PR: Tensor | None = None,
    ) -> tuple[Tensor, Memory]:
        """As Mixer has it. Memory: the convolution's last W - 1 inputs, and the state B x H x N x P, float32."""
        own = self.own
        recent_BVU, state_BHNP = (None, None) if memory is None else memory
        gate_BTO, channels_BTU, steps_BTH = x_BTI.split(self.sizes, -1)
        channels_BTU, recent_BVU = self.convolution(channels_BTU, starts_BT, recent_BVU)
        values_BTO, write_BTM, read_BTM = channels_BTU.split(self.parts, -1)
        y_BTHP, state_BHNP = scan(
            values_BTO.unflatten(-1, (-1, own.head_width)),
            F.softplus(steps_BTH.float() + self.step_bias),
            -self.log_poles.float().exp(),
            write_BTM.unflatten(-1, (own.groups, -1)),
            read_BTM.unflatten(-1, (own.groups, -1)),
            chunk_tokens=own.chunk_tokens,
            kernel=own.scan_kernel,
            starts_BT=starts_BT,
            state_BHNP=state_BHNP,
        )
        skip_H = skip_with(self.skip, self.port_skip, advice_PR)
        y_BTO = gated_norm(
            y_BTHP.flatten(2), values_BTO, skip_H, gate_BTO, self.norm_weight, groups=own.groups, epsilon=self.epsilon
        )
        return y_BTO, (recent_BVU, state_BHNP)


def _initial_steps(heads: int) -> Tensor:
    """What softplus turns into log-uniform steps."""
    low, high = (math.log(step) for step in STEPS)
    steps_H = torch.empty(heads).uniform_(low, high).exp()
    return steps_H + torch.log(-torch.expm1(-steps_H))
