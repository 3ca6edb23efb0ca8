"""Rows: the contexts in which a block first leaves what chosen tokens need, and then runs on those tokens alone.

Shapes: B sequences, T tokens, N = B * T, K chosen rows, D hidden width, H query heads, J key and value heads, E width
of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from pylon_trainer.gating.recall import Product, multiply, recall
from pylon_trainer.gating.tiles import Tiles
from pylon_trainer.models.context import Context, Linear


@dataclass(frozen=True)
class Rows:
    """Which tokens are chosen, where they are and what they see. The same for all blocks."""

    rows_K: Tensor
    """Their places among the N tokens, distinct and rising."""
    starts_K: Tensor | None
    """First place of its sequence that each may see; None is 0."""
    cos_KE: Tensor
    sin_KE: Tensor
    tiles: Tiles

    @classmethod
    def of(cls, rows_K: Tensor, context: Context, sequences: int, tokens: int) -> Rows:
        """Distinct, rising rows of a micro-batch of sequences x tokens."""
        starts_K = None if context.starts_BT is None else context.starts_BT.flatten()[rows_K]
        # cos and sin are those of one sequence, or of all.
        places_K = rows_K % tokens if context.cos.ndim == 2 else rows_K
        return cls(
            rows_K,
            starts_K,
            context.cos.flatten(0, -2)[places_K],
            context.sin.flatten(0, -2)[places_K],
            Tiles.of(rows_K, starts_K, sequences, tokens),
        )

    def take(self, x_BTD: Tensor) -> Tensor:
        """The chosen rows, as one sequence: 1 x K x D."""
        return x_BTD.flatten(0, 1).index_select(0, self.rows_K).unsqueeze(0)


@dataclass(frozen=True)
class KeepingContext(Context):
    """The plain context, which keeps the keys and values that it saw and, if asked, the products."""

    precision: torch.dtype | None
    """Of the products; None: that of the weights."""
    keeps_products: bool
    keys_values: list[Tensor] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)

    @classmethod
    def like(cls, context: Context, precision: torch.dtype | None, keeps_products: bool) -> KeepingContext:
        return cls(context.cos, context.sin, context.starts_BT, context.mask, precision, keeps_products)

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        """As Context has it."""
        weight = layer.weight if self.precision is None else layer.weight.to(self.precision)
        bias = None if layer.bias is None else layer.bias.to(weight.dtype)
        output = F.linear(x.to(weight.dtype), weight, bias)
        if self.keeps_products:
            self.products.append(Product(output, weight))
        return output

    def attend(self, q_BHTE: Tensor, k_BJTE: Tensor, v_BJTE: Tensor) -> Tensor:
        """As Context has it."""
        self.keys_values.extend((k_BJTE, v_BJTE))
        return super().attend(q_BHTE, k_BJTE, v_BJTE)


@dataclass(frozen=True)
class RecallingContext(Context):
    """Knows the products that the block will ask for, in their order; what is not known is multiplied."""

    precision: torch.dtype | None
    products: list[Product]

    @classmethod
    def like(cls, context: Context, precision: torch.dtype | None, products: list[Product]) -> RecallingContext:
        return cls(context.cos, context.sin, context.starts_BT, context.mask, precision, products)

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        """As Context has it."""
        return recall(layer, x, self.products.pop(0)) if self.products else multiply(layer, x, self.precision)


@dataclass(frozen=True)
class RowContext(RecallingContext):
    """Lets a block run on the chosen rows alone, as one sequence of K tokens: they attend to all tokens of their own
    sequence, whose keys and values are at hand."""

    rows: Rows
    k_BJTE: Tensor
    v_BJTE: Tensor

    @classmethod
    def of(
        cls, rows: Rows, k_BJTE: Tensor, v_BJTE: Tensor, precision: torch.dtype | None, products: list[Product]
    ) -> RowContext:
        """products: those of all tokens; none are known if it is empty."""
        known = [Product(rows.take(output_BTD), weight) for output_BTD, weight in products]
        return cls(rows.cos_KE, rows.sin_KE, rows.starts_K, None, precision, known, rows, k_BJTE, v_BJTE)

    def attend(self, q_1HKE: Tensor, k_1JKE: Tensor, v_1JKE: Tensor) -> Tensor:
        """1 x H x K x E. The rows' own keys and values take their places among the others, so that gradients reach
        them."""
        k_BJTE, v_BJTE = self._with_own(self.k_BJTE, k_1JKE), self._with_own(self.v_BJTE, v_1JKE)
        return self.rows.tiles.attend(q_1HKE, k_BJTE, v_BJTE)

    def _with_own(self, x_BJTE: Tensor, own_1JKE: Tensor) -> Tensor:
        own_KJE = own_1JKE.squeeze(0).transpose(0, 1)
        x_BTJE = x_BJTE.transpose(1, 2)
        x_NJE = x_BTJE.flatten(0, 1).index_copy(0, self.rows.rows_K, own_KJE)
        return x_NJE.view(x_BTJE.shape).transpose(1, 2)
