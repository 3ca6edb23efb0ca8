"""Dynamic low-rank adaptation: a linear layer as W0 x + A (s * (B x)), of which W0 need neither learn nor be kept.

W0 is absent, generated from a seed or dense; s, one number per rank, is 1 at first and may differ from token to token
(hyper.py). All ranks there will ever be are allocated at once, and s is 0 for those that are not in use yet: their rows
of B are drawn at the start, their columns of A are 0 and get no gradient, so growth changes neither the function nor
any shape, and nothing that was compiled, saved or kept by the optimizer.

Shapes: B sequences, T tokens, R ranks, I and O inputs and outputs of a layer.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, fields
from typing import cast

import torch
from torch import Tensor, nn

from pylon_api.training import AdaptationBase, AdaptationSpec
from pylon_trainer.models.context import Context, Linear, Mixer
from pylon_trainer.models.decoder import plain_linear


class AdaptedLinear(nn.Module):
    """What stands in the place of a linear layer without bias; runs in an AdaptedContext."""

    bias = None
    weight: Tensor | None
    """W0, O x I, by the name it has in a model without adaptation. None is zero."""

    def __init__(
        self, layer: nn.Linear, spec: AdaptationSpec, place: int, std: float, generated: Tensor | None
    ) -> None:
        """place: among the block's adapted layers. std: that the layer's weights were drawn with. generated: W0 if it
        comes from a seed. A dense W0 is the layer's."""
        super().__init__()
        self.place = place
        self.inward = plain_linear(layer.in_features, spec.allocated_rank)
        """B, R x I."""
        self.outward = plain_linear(spec.allocated_rank, layer.out_features)
        """A, O x R."""
        nn.init.normal_(self.inward.weight, std=1 / math.sqrt(layer.in_features))
        nn.init.zeros_(self.outward.weight)
        if spec.base is AdaptationBase.DENSE:
            self.weight = nn.Parameter(layer.weight.detach(), requires_grad=False)
        elif spec.base is AdaptationBase.SEED:
            self.register_buffer("weight", generated, persistent=False)
        else:
            self.weight = None
            # With nothing beside it, the product A B begins as large as the layer's weights were.
            in_use_OR = self.outward.weight.detach()[:, : spec.rank]
            nn.init.normal_(in_use_OR, std=std * math.sqrt(layer.in_features / spec.rank))

    def apply_scaled(self, x: Tensor, scale: Tensor, context: Context) -> Tensor:
        """... x O of ... x I; scale: R, or ... x R. The context knows plain layers only."""
        low = context.linear(self.inward, x)
        y = context.linear(self.outward, low * scale.to(low.dtype))
        return y if self.weight is None else y + context.linear(cast("Linear", self), x)

    def product(self, scale_R: Tensor) -> Tensor:
        """The one matrix, O x I, that computes the same where scales are these for every token."""
        low_rank_OI = (self.outward.weight * scale_R) @ self.inward.weight
        return low_rank_OI if self.weight is None else self.weight + low_rank_OI


_KNOWN = tuple(field.name for field in fields(Context))
"""What every context knows, whatever else it does."""


@dataclass(frozen=True)
class AdaptedContext(Context):
    """What a block's layers run in when they are adapted: all is the inner context's, but adapted layers get their
    scales."""

    inner: Context
    scales: tuple[Tensor, ...]
    """Of each adapted layer by its place: R, or B x T x R."""

    @classmethod
    def within(cls, inner: Context, scales: tuple[Tensor, ...]) -> AdaptedContext:
        return cls(**{name: getattr(inner, name) for name in _KNOWN}, inner=inner, scales=scales)

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        """As Context has it."""
        if isinstance(layer, AdaptedLinear):
            return layer.apply_scaled(x, self.scales[layer.place], self.inner)
        return self.inner.linear(layer, x)

    def attend(self, q_BHTE: Tensor, k_BJTE: Tensor, v_BJTE: Tensor) -> Tensor:
        """As Context has it."""
        return self.inner.attend(q_BHTE, k_BJTE, v_BJTE)

    def mix(self, mixer: Mixer, x_BTI: Tensor) -> Tensor:
        """As Context has it."""
        return self.inner.mix(mixer, x_BTI)


class Ranks(nn.Module):
    """Which ranks are in use, in all layers alike: 1 for these, 0 for the others."""

    active_R: Tensor

    def __init__(self, spec: AdaptationSpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("active_R", torch.zeros(spec.allocated_rank))
        self.grow(0)

    def grow(self, step: int) -> None:
        """To as many as are in use after so many steps."""
        self.active_R[: self.spec.rank_at(step)] = 1.0


def generate(seed: int, name: str, outputs: int, inputs: int, std: float) -> Tensor:
    """W0 of the layer of this name, O x I, the same wherever PyTorch draws the same on its CPU."""
    number = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(number)) * std
