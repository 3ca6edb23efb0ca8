"""The hyper-network of a block: from what the tokens so far are about to a scale for every rank of its linear layers.

It reads a causal summary of what enters the block, asks the codebook, and turns the mixture of atoms into scales; they
are 1 while its last layer is 0, as at the start. One for all of a block's layers, because a retrieval for each would
cost more than the narrow layers it serves. Tokens meet in the summary alone, which is a mixer like any other
(models/context.py), so gated engines and caches know what to do with it.

Shapes: B sequences, T tokens, D hidden width, W width of an atom, E rates of decay, L layers, R ranks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pylon_trainer.models.context import Context, Memory, Mixer
from pylon_trainer.models.decoder import plain_linear
from pylon_trainer.models.ports import Port, PortKind
from pylon_trainer.models.resonate.codebook import Codebook
from pylon_trainer.models.resonate.long_convolution import long_convolution

SUMMARY_TOKENS = (1.0, 8.0, 64.0, 512.0)
"""Over how many tokens the parts of a summary reach at first: each a quarter of its channels."""


class Summary(Mixer):
    """Means over the tokens of the document so far that fade with distance, the token itself included."""

    def __init__(self, chunk_tokens: int) -> None:
        super().__init__()
        self.chunk_tokens = chunk_tokens
        self.log_rates = nn.Parameter(-torch.tensor(SUMMARY_TOKENS).log())
        """E: logarithms of the exponents by which a token fades with each that follows."""

    def run(
        self,
        x_BTI: Tensor,
        starts_BT: Tensor | None = None,
        memory: Memory | None = None,
        advice_PR: Tensor | None = None,  # noqa: ARG002  a mean has no port
    ) -> tuple[Tensor, Memory]:
        """As Mixer has it, B x T x W of the same. Memory: the state B x E x 1 x W, float32."""
        exponents_E = self.log_rates.float().exp()
        gains_EE = torch.diag(-torch.expm1(-exponents_E))  # so that a constant is its own mean
        y_BTI, state = long_convolution(
            x_BTI, exponents_E, gains_EE, self.chunk_tokens, starts_BT, None if memory is None else memory[0]
        )
        return y_BTI, (state,)


class HyperNetwork(nn.Module):
    """Of one block."""

    def __init__(self, hidden_size: int, layers: int, rank: int, chunk_tokens: int, codebook: Codebook) -> None:
        super().__init__()
        width = codebook.spec.width
        self.layers = layers
        self.norm = nn.RMSNorm(hidden_size, elementwise_affine=False)
        self.input = plain_linear(hidden_size, width)
        self.summary = Summary(chunk_tokens)
        self.hidden = nn.Linear(width, width)
        self.query = plain_linear(width, 2 * width)
        self.codebook = codebook
        self.scales = plain_linear(width, layers * rank)
        self.port_query: Port | None = None
        nn.init.normal_(self.input.weight, std=1 / math.sqrt(hidden_size))
        nn.init.zeros_(self.scales.weight)

    def open_ports(self, advice_size: int) -> None:
        """As Block has it."""
        self.port_query = Port(PortKind.HYPER, advice_size, self.hidden.out_features)

    def offers(self, x_BTD: Tensor, context: Context) -> Tensor:
        """What tokens offer to later ones, B x T x W."""
        return context.linear(self.input, self.norm(x_BTD))

    def forward(self, offered_BTW: Tensor, context: Context) -> tuple[Tensor, ...]:
        """Scales of each layer, B x T x R, from what all tokens offer."""
        summary_BTW = context.mix(self.summary, offered_BTW)
        hidden_BTW = context.linear(self.hidden, summary_BTW)
        if self.port_query is not None and context.advice_PR is not None:
            hidden_BTW = hidden_BTW + self.port_query(context.advice_PR)
        query = context.linear(self.query, F.silu(hidden_BTW))
        scales = 1 + context.linear(self.scales, self.codebook(query, context))
        return scales.chunk(self.layers, -1)
