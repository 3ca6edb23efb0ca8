"""The Transformer: a pre-norm decoder that computes what Llama computes, at any size.

Shapes: B sequences, T tokens, D hidden width, H query heads, J key and value heads, E width of a head, F inner width
of the MLP; a tensor's name ends in its shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pylon_api.training import ModelSpec
from pylon_trainer.models.context import Context
from pylon_trainer.models.decoder import Block, Decoder, plain_linear

GatedActivation = Callable[[Tensor, Tensor], Tensor]
"""activation(gate) * up, element by element; an nn.Module when it has parameters."""


class Transformer(Decoder):
    """Attention and an MLP in every block."""

    def _block(self, number: int) -> Block:  # noqa: ARG002  all alike
        return AttentionBlock(self.spec)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU's gated product (Shazeer 2020, arXiv:2002.05202)."""
    return F.silu(gate) * up


class AttentionBlock(Block):
    """Attention, then the MLP, each on a normed copy and added to the residual stream."""

    def __init__(self, spec: ModelSpec, activation: GatedActivation = swiglu) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(spec.hidden_size, eps=spec.norm_epsilon)
        self.attention = Attention(spec)
        self.mlp_norm = nn.RMSNorm(spec.hidden_size, eps=spec.norm_epsilon)
        self.mlp = GatedMLP(spec.hidden_size, intermediate_size(spec), activation)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), context)
        updated_BTD: Tensor = x_BTD + self.mlp(self.mlp_norm(x_BTD), context)
        return updated_BTD

    def offers(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, ...]:
        """What tokens offer to those that attend to them, each B x J x T x E."""
        return self.attention.offers(self.attention_norm(x_BTD), context)

    def residual_outputs(self) -> tuple[nn.Linear, ...]:
        return self.attention.output, self.mlp.down


class Attention(nn.Module):
    """Causal attention in which groups of H / J query heads share a key and a value head."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.width = spec.hidden_size // spec.heads
        kv_width = (spec.kv_heads or spec.heads) * self.width
        self.query = plain_linear(spec.hidden_size, spec.hidden_size)
        self.key = plain_linear(spec.hidden_size, kv_width)
        self.value = plain_linear(spec.hidden_size, kv_width)
        self.output = plain_linear(spec.hidden_size, spec.hidden_size)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        k_BJTE, v_BJTE = self.offers(x_BTD, context)
        q_BHTE = rotate(self._heads(context.linear(self.query, x_BTD)), context)
        y_BHTE = context.attend(q_BHTE, k_BJTE, v_BJTE)
        return context.linear(self.output, y_BHTE.transpose(1, 2).flatten(2))

    def offers(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """What tokens offer to those that attend to them, each B x J x T x E."""
        k_BJTE = rotate(self._heads(context.linear(self.key, x_BTD)), context)
        return k_BJTE, self._heads(context.linear(self.value, x_BTD))

    def _heads(self, x: Tensor) -> Tensor:
        """B x T x (heads E) to B x heads x T x E."""
        return x.view(*x.shape[:-1], x.shape[-1] // self.width, self.width).transpose(1, 2)


class GatedMLP(nn.Module):
    """activation(gate x) * (up x), then down."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: GatedActivation) -> None:
        super().__init__()
        self.activation = activation
        self.gate = plain_linear(hidden_size, intermediate_size)
        self.up = plain_linear(hidden_size, intermediate_size)
        self.down = plain_linear(intermediate_size, hidden_size)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        gated_BTF = self.activation(context.linear(self.gate, x_BTD), context.linear(self.up, x_BTD))
        return context.linear(self.down, gated_BTF)


def intermediate_size(spec: ModelSpec) -> int:
    """Inner width of the MLP: as given, or 8/3 of the hidden size rounded up to a multiple of 64."""
    return spec.intermediate_size or 64 * math.ceil(spec.hidden_size * 8 / 3 / 64)


def rotate(x_BHTE: Tensor, context: Context) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864): pair i is (i, i + E/2), as Llama's weights expect."""
    cos, sin = context.cos.to(x_BHTE.dtype), context.sin.to(x_BHTE.dtype)
    first, second = x_BHTE.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
