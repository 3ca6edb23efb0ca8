"""Context: what a block is told beside its hidden states, and the two things that it leaves to others.

A block does everything to each token alone, except in `attend`, and multiplies by its weights in `linear` only. So the
gated engines (gating/engine.py) can run the same block on chosen tokens: they hand it a context that knows the other
tokens, and the products that were computed before. Nothing else in a block may look across tokens.

Shapes: B sequences, T tokens, D hidden width, H query heads, J key and value heads, E width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Linear(Protocol):
    """x W^T + b: an nn.Linear, or what has its weight (outputs x inputs) and bias."""

    @property
    def weight(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor | None: ...


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
    """B x 1 x T x T, True where a query may look; None without starts_BT, from which it is derived."""

    @classmethod
    def of(cls, places: Tensor, cos: Tensor, sin: Tensor, starts_BT: Tensor | None = None) -> Context:
        """The context of these positions and first visible places."""
        return cls(places, cos, sin, starts_BT, None if starts_BT is None else _mask(starts_BT))

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


def _mask(starts_BT: Tensor) -> Tensor:
    places_T = torch.arange(starts_BT.shape[1], device=starts_BT.device)
    return ((places_T >= starts_BT[..., None]) & (places_T <= places_T[:, None])).unsqueeze(1)
