"""Rows: the contexts in which a block first leaves what chosen tokens need, and then runs on those tokens alone.

Shapes: B sequences, T tokens, N = B * T, K chosen rows, D hidden width, H query heads, J key and value heads, E width
of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pylon_trainer.gating.recall import Product, multiply, recall
from pylon_trainer.gating.tiles import Tiles
from pylon_trainer.kernels.attention import Attended, Layout, attend_all, attend_rows
from pylon_trainer.models.context import Context, Linear, Mixer
from pylon_trainer.models.recompute import recomputed


@dataclass(frozen=True)
class Rows:
    """Which tokens are chosen, where they are and what they see. The same for all blocks."""

    rows_K: Tensor
    """Their places among the N tokens, distinct and rising."""
    tokens_K: Tensor
    """Their ids."""
    places_K: Tensor
    """Their places within their documents."""
    starts_K: Tensor | None
    """First place of its sequence that each may see; None is 0."""
    starts_BT: Tensor | None
    """The same of all tokens."""
    cos_KE: Tensor
    sin_KE: Tensor
    sequences: int
    tokens: int
    """Of a sequence."""
    layout: Layout | Tiles

    @classmethod
    def of(cls, rows_K: Tensor, context: Context, tokens_BT: Tensor) -> Rows:
        """Distinct, rising rows of a micro-batch."""
        starts_K = None if context.starts_BT is None else context.starts_BT.flatten()[rows_K]
        sequences, tokens = tokens_BT.shape
        in_context_K = rows_K % tokens if context.places.ndim == 1 else rows_K
        return cls(
            rows_K,
            tokens_BT.flatten()[rows_K],
            context.places.flatten()[in_context_K],
            starts_K,
            context.starts_BT,
            context.cos.flatten(0, -2)[in_context_K],
            context.sin.flatten(0, -2)[in_context_K],
            sequences,
            tokens,
            lay_out(rows_K, starts_K, sequences, tokens),
        )

    def narrow(self, kept_R: Tensor) -> Rows:
        """Some of them; kept_R: rising positions among the K."""
        rows_R, starts_R = self.rows_K[kept_R], None if self.starts_K is None else self.starts_K[kept_R]
        return Rows(
            rows_R,
            self.tokens_K[kept_R],
            self.places_K[kept_R],
            starts_R,
            self.starts_BT,
            self.cos_KE[kept_R],
            self.sin_KE[kept_R],
            self.sequences,
            self.tokens,
            lay_out(rows_R, starts_R, self.sequences, self.tokens),
        )

    def sizes(self) -> list[tuple[Tensor, tuple[int, ...]]]:
        """Its tensors, each with the dims whose size follows from the number of rows."""
        each = [self.rows_K, self.tokens_K, self.places_K, self.cos_KE, self.sin_KE]
        if self.starts_K is not None:
            each.append(self.starts_K)
        return [*((x, (0,)) for x in each), *self.layout.sizes()]

    def take(self, x_BTD: Tensor) -> Tensor:
        """The chosen rows, as one sequence: 1 x K x D."""
        return x_BTD.flatten(0, 1).index_select(0, self.rows_K).unsqueeze(0)


def lay_out(rows_K: Tensor, starts_K: Tensor | None, sequences: int, tokens: int) -> Layout | Tiles:
    """For our kernel on CUDA, for PyTorch's attention elsewhere."""
    if rows_K.is_cuda:
        return Layout.of(rows_K, starts_K, sequences, tokens)
    return Tiles.of(rows_K, starts_K, sequences, tokens)


@dataclass(frozen=True)
class KeepingContext(Context):
    """The plain context, which keeps what tokens offered to later ones and, if asked, the products and what attention
    gave."""

    precision: torch.dtype | None
    """Of the products; None: that of the weights."""
    keeps_products: bool
    offered: list[Tensor] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    attended: list[Attended | None] = field(default_factory=list)

    @classmethod
    def like(cls, context: Context, precision: torch.dtype | None, keeps_products: bool) -> KeepingContext:
        return cls(context.places, context.cos, context.sin, context.starts_BT, context.mask, precision, keeps_products)

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        """As Context has it."""
        product = multiply(layer, x, self.precision)
        if self.keeps_products:
            self.products.append(product)
        return product.output

    def attend(self, q_BHTE: Tensor, k_BJTE: Tensor, v_BJTE: Tensor) -> Tensor:
        """As Context has it."""
        self.offered.extend((k_BJTE, v_BJTE))
        attended = attend_all(q_BHTE, k_BJTE, v_BJTE) if self.keeps_products and self.mask is None else None
        self.attended.append(attended)
        if attended is None:
            return super().attend(q_BHTE, k_BJTE, v_BJTE)
        y_BTHE: Tensor = attended.y_NHE.unflatten(0, (len(q_BHTE), -1))
        return y_BTHE.transpose(1, 2)

    def mix(self, mixer: Mixer, x_BTI: Tensor) -> Tensor:
        """As Context has it."""
        self.offered.append(x_BTI)
        return super().mix(mixer, x_BTI)


@dataclass(frozen=True)
class RecallingContext(Context):
    """Knows the products that the block will ask for, in their order; what is not known is multiplied."""

    precision: torch.dtype | None
    products: list[Product]

    @classmethod
    def like(cls, context: Context, precision: torch.dtype | None, products: list[Product]) -> RecallingContext:
        return cls(context.places, context.cos, context.sin, context.starts_BT, context.mask, precision, products)

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        """As Context has it."""
        return recall(layer, x, self.products.pop(0)) if self.products else multiply(layer, x, self.precision).output


@dataclass(frozen=True)
class RowContext(RecallingContext):
    """Lets a block run on the chosen rows alone, as one sequence of K tokens: what all tokens of their own sequences
    offer is at hand."""

    rows: Rows
    offered: list[Tensor]
    """In the order in which the block will ask for it."""
    attended: list[Attended | None]
    """Likewise, None where it is not known."""

    @classmethod
    def at(
        cls,
        rows: Rows,
        offered: tuple[Tensor, ...],
        precision: torch.dtype | None,
        products: list[Product],
        attended: list[Attended | None],
    ) -> RowContext:
        """All as the keeping context has it, of all tokens."""
        known = [Product(rows.take(output_BTD), weight) for output_BTD, weight in products]
        return cls(
            rows.places_K, rows.cos_KE, rows.sin_KE, None, None, precision, known, rows, list(offered), list(attended)
        )

    def attend(self, q_1HKE: Tensor, k_1JKE: Tensor, v_1JKE: Tensor) -> Tensor:
        """1 x H x K x E. The rows' own keys and values stand for those among all that they equal, so that gradients
        reach them."""
        k_BJTE, v_BJTE = self.offered.pop(0), self.offered.pop(0)
        if isinstance(self.rows.layout, Layout):
            # Gradients that go to all keys and values reach the rows' own among them.
            own_JKE = None if k_BJTE.requires_grad else (k_1JKE.squeeze(0), v_1JKE.squeeze(0))
            known = self.attended.pop(0)
            return attend_rows(q_1HKE.squeeze(0), k_BJTE, v_BJTE, self.rows.layout, own_JKE, known).unsqueeze(0)
        k_BJTE, v_BJTE = self._with_own(k_BJTE, k_1JKE), self._with_own(v_BJTE, v_1JKE)
        return self.rows.layout.attend(q_1HKE, k_BJTE, v_BJTE)

    def _with_own(self, x_BJTE: Tensor, own_1JKE: Tensor) -> Tensor:
        own_KJE = own_1JKE.squeeze(0).transpose(0, 1)
        x_BTJE = x_BJTE.transpose(1, 2)
        x_NJE = x_BTJE.flatten(0, 1).index_copy(0, self.rows.rows_K, own_KJE)
        return x_NJE.view(x_BTJE.shape).transpose(1, 2)

    def mix(self, mixer: Mixer, x_1KI: Tensor) -> Tensor:
        """1 x K x O. The mixer runs over all tokens, with the rows' own inputs among them, so that gradients reach
        these from every chosen row that remembers them."""
        x_BTI = self.offered.pop(0)
        rows = self.rows

        def mix_rows(own_1KI: Tensor, all_BTI: Tensor) -> Tensor:
            x_NI = all_BTI.flatten(0, 1).index_copy(0, rows.rows_K, own_1KI.squeeze(0))
            return rows.take(mixer.run(x_NI.view(all_BTI.shape), rows.starts_BT)[0])

        return recomputed(mix_rows, mixer, x_1KI, x_BTI)
