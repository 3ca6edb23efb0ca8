"""Engines: one forward pass of a Transformer, and a backward pass from chosen rows of its hidden states.

The rows are chosen from what the forward pass shows at the top, so no autograd graph can be cut to them beforehand.
`HeadOnly` therefore goes back through everything: exact, and only the head gets cheaper. `SinglePass` runs the
forward pass without a graph, keeps what the rows may need, and walks back over the blocks by an explicit loop: each
block runs again on the chosen rows, with a graph of its own that lives for one block. One loop instead of a
`torch.autograd.Function` per block keeps autograd's accumulation of gradients, frees each block's memory in turn, and
leaves three plain functions to compile.

What SinglePass leaves out: the gradient that reaches tokens that were not chosen through their keys and values. With
`KvGradient.TRUNCATED` it ends at those keys and values. With `KvGradient.DENSE` it goes on into the key and value
weights and the norm before them, and ends at the block's input; so what a block's weights receive is exact given the
gradient above the block, and only the gradient between blocks is cut. When all rows are chosen nothing is cut.

What it costs, in forward passes, at ratio r: 1 + 2r with `RowActivations.KEEP`, which holds the outputs of all linear
layers like a plain step; 1 + 3r with `RowActivations.RECOMPUTE`, which holds one hidden state and the keys and values
per block. The attention of the chosen queries is computed twice in both.

Shapes: B sequences, T tokens, N = B * T, K chosen rows, D hidden width, J key and value heads, E width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

from pylon_api.training import Compile, GatingEngine, KvGradient, RowActivations, TrainingSpec
from pylon_trainer.gating.recall import Recall, Record
from pylon_trainer.gating.rows import KeepingContext, RowContext, Rows
from pylon_trainer.models import Transformer
from pylon_trainer.models.transformer import Block, Context
from pylon_trainer.step import Batch

SendBack = Callable[[Tensor, Tensor], None]
"""Takes rows_K, distinct and rising, and the gradient at them, K x D; adds to the gradients of the parameters below the
head. To be called once."""

Autocast = Callable[[], AbstractContextManager[object]]
Piece = TypeVar("Piece", bound=Callable[..., object])


class Engine(Protocol):
    """A forward pass that can be gone back over from chosen rows."""

    def forward(self, batch: Batch) -> tuple[Tensor, SendBack]:
        """Hidden states N x D after the last norm, without a graph, and the way back."""
        ...


def build_engine(model: Transformer, training: TrainingSpec, autocast: Autocast) -> Engine:
    """The engine that `training.gating` asks for."""
    if training.gating.engine is GatingEngine.HEAD_ONLY:
        return HeadOnly(model, autocast)
    return SinglePass(
        model,
        autocast,
        activations=training.gating.row_activations,
        kv_gradient=training.gating.kv_gradient,
        compile_backend="inductor" if training.compile is Compile.DEFAULT else None,
    )


@dataclass(frozen=True)
class HeadOnly:
    """Backward through all rows of all blocks: exact for any rows."""

    model: Transformer
    autocast: Autocast

    def forward(self, batch: Batch) -> tuple[Tensor, SendBack]:
        """As Engine has it."""
        with self.autocast():
            hidden_ND = self.model(batch.tokens_BT, batch.documents_BT).flatten(0, 1)

        def back(rows_K: Tensor, gradient_KD: Tensor) -> None:
            send_back(hidden_ND, torch.zeros_like(hidden_ND).index_add_(0, rows_K, gradient_KD))

        return hidden_ND.detach(), back


class _Kept(NamedTuple):
    """What the forward pass of a block leaves for the way back."""

    x_BTD: Tensor
    """Its input."""
    k_BJTE: Tensor
    v_BJTE: Tensor
    linears: list[Tensor]
    """Outputs of its linear layers in the order of their calls; empty when the rows are to be recomputed."""


class SinglePass:
    """Backward through the chosen rows alone."""

    def __init__(
        self,
        model: Transformer,
        autocast: Autocast,
        *,
        activations: RowActivations,
        kv_gradient: KvGradient,
        compile_backend: str | None,
    ) -> None:
        self._model = model
        self._autocast = autocast
        self._keeps = activations is RowActivations.KEEP
        self._is_dense = kv_gradient is KvGradient.DENSE
        # A ModuleList does not say what is in it.
        self._blocks = cast("list[Block]", list(model.blocks))
        self._forward = _compiled(_forward, compile_backend)
        self._run_rows = _compiled(_run_rows, compile_backend)
        self._keys_values = _compiled(_keys_values, compile_backend)

    @torch.no_grad()
    def forward(self, batch: Batch) -> tuple[Tensor, SendBack]:
        """As Engine has it."""
        trail: list[_Kept] = []
        with self._autocast():
            x_BTD = self._model.embed(batch.tokens_BT)
            context = self._model.context(batch.tokens_BT, batch.documents_BT)
            for block in self._blocks:
                kept, x_BTD = self._forward(block, x_BTD, context, self._keeps)
                trail.append(kept)
            hidden_ND = self._model.norm(x_BTD).flatten(0, 1)

        def back(rows_K: Tensor, gradient_KD: Tensor) -> None:
            self._back(batch, context, trail, x_BTD, rows_K, gradient_KD)

        return hidden_ND, back

    def _back(
        self, batch: Batch, context: Context, trail: list[_Kept], top_BTD: Tensor, rows_K: Tensor, gradient_KD: Tensor
    ) -> None:
        rows = Rows.of(rows_K, context, *batch.tokens_BT.shape)
        leaf_1KD = rows.take(top_BTD).requires_grad_()
        with self._autocast():
            hidden_1KD = self._model.norm(leaf_1KD)
        gradient_1KD = _through(hidden_1KD, leaf_1KD, gradient_KD.unsqueeze(0))
        for block in reversed(self._blocks):
            gradient_1KD = self._back_over(block, trail.pop(), context, rows, gradient_1KD)
        with self._autocast():
            entering_KD = self._model.embed(batch.tokens_BT.flatten()[rows_K])
        if entering_KD.requires_grad:  # not when the embedding is frozen
            send_back(entering_KD, gradient_1KD.squeeze(0))

    def _back_over(self, block: Block, kept: _Kept, context: Context, rows: Rows, gradient_1KD: Tensor) -> Tensor:
        """Adds to the gradients of a block's parameters; returns the gradient at the rows of its input."""
        x_BTD, k_BJTE, v_BJTE, linears = kept
        if not self._is_dense:
            leaf_1KD = rows.take(x_BTD).requires_grad_()
            with self._autocast():
                y_1KD = self._run_rows(block, leaf_1KD, RowContext.of(rows, k_BJTE, v_BJTE), linears)
            return _through(y_1KD, leaf_1KD, gradient_1KD)
        leaf_BTD = x_BTD.requires_grad_()
        with self._autocast():
            k_BJTE, v_BJTE = self._keys_values(block, leaf_BTD, context, linears)
            y_1KD = self._run_rows(block, rows.take(leaf_BTD), RowContext.of(rows, k_BJTE, v_BJTE), linears)
        return rows.take(_through(y_1KD, leaf_BTD, gradient_1KD))


def _compiled(piece: Piece, backend: str | None) -> Piece:
    return piece if backend is None else cast("Piece", torch.compile(piece, backend=backend, fullgraph=True))


def _forward(block: Block, x_BTD: Tensor, context: Context, keeps: bool) -> tuple[_Kept, Tensor]:
    linears: list[Tensor] = []
    keeping = KeepingContext(context.cos, context.sin, context.mask)
    with Record(linears) if keeps else nullcontext():
        y_BTD = block(x_BTD, keeping)
    k_BJTE, v_BJTE = keeping.kept
    return _Kept(x_BTD, k_BJTE, v_BJTE, linears), y_BTD


def _run_rows(block: Block, x_1KD: Tensor, context: RowContext, linears: list[Tensor]) -> Tensor:
    """The block's output at the chosen rows, 1 x K x D."""
    with Recall([context.rows.take(output_BTD) for output_BTD in linears]) if linears else nullcontext():
        y_1KD: Tensor = block(x_1KD, context)
    return y_1KD


def _keys_values(block: Block, x_BTD: Tensor, context: Context, linears: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values of all tokens, each B x J x T x E."""
    # Copies: what a compiled function returns as a view of an argument has that argument's history, here none.
    with Recall([output_BTD.clone() for output_BTD in linears[1:3]]) if linears else nullcontext():
        k_BJTE, v_BJTE = block.attention.keys_values(block.attention_norm(x_BTD), context)
    return k_BJTE, v_BJTE


def _through(output: Tensor, leaf: Tensor, gradient: Tensor) -> Tensor:
    """Backward from the output; returns the gradient at the leaf."""
    send_back(output, gradient)
    assert leaf.grad is not None
    return leaf.grad


def send_back(output: Tensor, gradient: Tensor) -> None:
    """Backward, bit for bit as `output.backward(gradient)`, which would first import sympy for seconds (torch.autograd
    looks at the shape of a gradient that it is given)."""
    (output * gradient).sum().backward()
