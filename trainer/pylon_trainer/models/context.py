"""Context: what a block is told beside its hidden states, and the three things that it leaves to others.

A block does everything to each token alone, except in `attend` and `mix`, and multiplies by its weights in `linear`
only. So the gated engines (gating/engine.py) can run the same block on chosen tokens: they hand it a context that knows
the other tokens, and the products that were computed before; and a cache (models/resonate/cache.py) can run it on new
tokens: its context remembers the earlier ones. Nothing else in a block may look across tokens.

Shapes: B sequences, T tokens, D hidden width, H query heads, J key and value heads, E width of a head, I and O widths
that a mixer takes and gives, P kinds of ports, R size of the advice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pylon_trainer.models.recompute import recomputed


class Linear(Protocol):
    """x W^T + b: an nn.Linear, or what has its weight (outputs x inputs) and bias."""

    @property
    def weight(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor | None: ...


class Mixer(nn.Module, ABC):
    """A layer in which tokens meet by a state that is handed along the sequence."""

    @abstractmethod
    def run(
        self,
        x_BTI: Tensor,
        starts_BT: Tensor | None = None,
        memory: Memory | None = None,
        advice_PR: Tensor | None = None,
    ) -> tuple[Tensor, Memory]:
        """B x T x O, and what later tokens need to know of these and those before.

        starts_BT: first place of each token's document, where memory begins anew. memory: of the tokens before.
        advice_PR: as Context has it.
        """


Memory = tuple[Tensor, ...]
"""What a mixer hands along: tensors whose size does not depend on the number of tokens."""


@dataclass(frozen=True)
class Context:
    """The plain one: all tokens, each looking back. Computed once per forward pass."""

    places: Tensor
    """T, or B x T when positions start again within a sequence: the place of each token in its document."""
    cos: Tensor
    """T x E/2, or B x 1 x T x E/2, as places."""
    sin: Tensor
    """As cos."""
    starts_BT: Tensor | None
    """First place of its sequence that each token may see: where its document or its window begins. None is 0."""
    mask: Tensor | None
    """B x 1 x T x T, True where a query may look; None without starts_BT, from which it is derived, and where no block
    attends."""
    holds_mixers: bool = field(default=False, kw_only=True)
    """Whether what lies within a mixer is held for the way back; where whole blocks run again, once is enough."""
    advice_PR: Tensor | None = field(default=None, kw_only=True)
    """P x R: what ports of each kind are told (models/ports.py); None where there are none."""

    @classmethod
    def of(
        cls, places: Tensor, cos: Tensor, sin: Tensor, starts_BT: Tensor | None = None, *, attends: bool = True
    ) -> Context:
        """The context of these positions and first visible places. attends: whether any block asks for the mask."""
        return cls(places, cos, sin, starts_BT, _mask(starts_BT) if attends and starts_BT is not None else None)

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        """The product of a layer."""
        return F.linear(x, layer.weight, layer.bias)

    def attend(self, q_BHTE: Tensor, k_BJTE: Tensor, v_BJTE: Tensor) -> Tensor:
        """Attention of every token to those that it may see, B x H x T x E."""
        return F.scaled_dot_product_attention(
            q_BHTE,
            k_BJTE,
            v_BJTE,
            attn_mask=self.mask,
            is_causal=self.mask is None,
            enable_gqa=q_BHTE.shape[1] != k_BJTE.shape[1],
        )

    def mix(self, mixer: Mixer, x_BTI: Tensor) -> Tensor:
        """What a mixer makes of all tokens, each with those before it in its document, B x T x O."""
        if self.holds_mixers:
            with torch.autocast(x_BTI.device.type, enabled=False):
                return mixer.run(x_BTI, self.starts_BT, advice_PR=self.advice_PR)[0]
        # The way back runs the mixer again from x_BTI, which is held anyway, so that nothing within it is held.
        inputs = (x_BTI,) if self.advice_PR is None else (x_BTI, self.advice_PR)
        return recomputed(lambda x, advice=None: mixer.run(x, self.starts_BT, advice_PR=advice)[0], mixer, *inputs)


def _mask(starts_BT: Tensor) -> Tensor:
    places_T = torch.arange(starts_BT.shape[1], device=starts_BT.device)
    return ((places_T >= starts_BT[..., None]) & (places_T <= places_T[:, None])).unsqueeze(1)
