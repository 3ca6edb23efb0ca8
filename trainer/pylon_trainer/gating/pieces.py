"""Pieces: what engines do with one block, as functions that can be compiled.

Each is compiled once for all blocks, without a graph break, and with the number of rows left open, so that a gate may
move along its ratios. The way back over a piece is autograd's and is compiled with it.

Shapes: B sequences, T tokens, K chosen rows, D hidden width, J key and value heads, E width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from pylon_trainer.gating.recall import Product
from pylon_trainer.gating.rows import KeepingContext, RecallingContext, RowContext, Rows
from pylon_trainer.gating.trunk import Block
from pylon_trainer.kernels.attention import Attended
from pylon_trainer.models.context import Context

Piece = TypeVar("Piece", bound=Callable[..., object])
Backend = str | Callable[..., Any] | None
"""Of torch.compile; None compiles nothing."""


class Kept(NamedTuple):
    """What the forward pass of a block leaves for the way back."""

    offered: tuple[Tensor, ...]
    """What its tokens offer to later ones."""
    products: list[Product]
    """Of its linear layers in the order of their calls; empty when the rows are to be recomputed."""
    attended: list[Attended | None]
    """What attention gave, where it was asked for and the device can use it."""


class Pieces:
    """The three functions, compiled or as they are."""

    def __init__(self, backend: Backend) -> None:
        self._is_compiled = backend is not None
        self.run = _compiled(_run, backend)
        self.offers = _compiled(_offers, backend)
        self._run_rows = _compiled(_run_rows, backend)

    def run_rows(self, block: Block, x_1KD: Tensor, rows: Rows, kept: Kept, precision: torch.dtype | None) -> Tensor:
        """The block's output at the chosen rows, 1 x K x D."""
        if self._is_compiled:
            _leave_open(x_1KD, 1)
            for tensor, dims in rows.sizes():
                _leave_open(tensor, *dims)
        return self._run_rows(block, x_1KD, rows, kept, precision)


def _run(
    block: Block, x_BTD: Tensor, context: Context, precision: torch.dtype | None, keeps_products: bool
) -> tuple[Tensor, Kept]:
    """The block's output for all tokens, B x T x D."""
    keeping = KeepingContext.like(context, precision, keeps_products)
    y_BTD = block(x_BTD, keeping)
    return y_BTD, Kept(tuple(keeping.offered), keeping.products, keeping.attended)


def _run_rows(block: Block, x_1KD: Tensor, rows: Rows, kept: Kept, precision: torch.dtype | None) -> Tensor:
    return block(x_1KD, RowContext.at(rows, kept.offered, precision, kept.products, kept.attended))


def _offers(
    block: Block, x_BTD: Tensor, context: Context, kept: Kept, precision: torch.dtype | None
) -> tuple[Tensor, ...]:
    """What all tokens offer, with gradients."""
    # Copies: what a compiled function returns as a view of an argument has that argument's history, here none.
    known = [Product(output_BTD.clone(), weight) for output_BTD, weight in kept.products]
    return block.offers(x_BTD, RecallingContext.like(context, precision, known))


def _compiled(piece: Piece, backend: Backend) -> Piece:
    return piece if backend is None else cast("Piece", torch.compile(piece, backend=backend, fullgraph=True))


def _leave_open(tensor: Tensor, *dims: int) -> None:
    for dim in dims:
        torch._dynamo.maybe_mark_dynamic(tensor, dim)
