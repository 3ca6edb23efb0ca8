"""Engines: one forward pass over a trunk, and a way back from chosen rows of its hidden states.

The rows are chosen from what the forward pass shows at the top, so no autograd graph can be cut to them beforehand.
`HeadOnly` therefore goes back through everything: exact, and only the head gets cheaper. The others run the forward
pass without a graph and give one to the chosen rows alone, block by block: `SinglePass` (single_pass.py) on the way
back, from what the forward pass kept; `TwoPass` (two_pass.py) in a second pass over the rows. One loop over
blocks, instead of a `torch.autograd.Function` per block, frees each block's memory in turn and leaves plain functions
to compile.

What the row engines leave out: the gradient that reaches tokens that were not chosen through their keys and values.
With `KvGradient.TRUNCATED` it ends at those keys and values. With `KvGradient.DENSE`, which needs SinglePass, it goes
on into the key and value weights and the norm before them, and ends at the block's input; so what a block's weights
receive is exact given the gradient above the block, and only the gradient between blocks is cut. When all rows are
chosen nothing is cut.

| engine | row activations | costs, in forward passes, at ratio r | holds per block until the way back |
|---|---|---|---|
| SinglePass | Keep | 1 + 2r | its input, what its layers and attention gave, like a plain step; its weights as cast |
| SinglePass | Recompute | 1 + 3r | its input, keys and values |
| TwoPass | Keep | 1 + 3r | keys and values; for chosen rows what a plain step holds |
| TwoPass | Recompute | 1 + 4r | keys and values; for chosen rows its input |

The attention of the chosen queries is computed a second time in all but the first on CUDA, a third time in the last.

Shapes: B sequences, T tokens, N = B * T, K chosen rows, D hidden width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from pylon_api.training import GatingEngine, GatingSpec
from pylon_trainer.gating.depth import Depth
from pylon_trainer.gating.ends import Autocast, Back, Ends
from pylon_trainer.gating.gradients import Sink, go_back
from pylon_trainer.gating.single_pass import SinglePass
from pylon_trainer.gating.trunk import Trunk
from pylon_trainer.gating.two_pass import TwoPass
from pylon_trainer.step import Batch


class Engine(Protocol):
    """A forward pass that can be gone back over from chosen rows."""

    def forward(self, batch: Batch) -> tuple[Tensor, Back]:
        """Hidden states N x D after the last norm, without a graph, and the way back."""
        ...


def build_engine(trunk: Trunk, gating: GatingSpec, autocast: Autocast, *, compile_backend: str | None) -> Engine:
    """The engine that the spec asks for. compile_backend: None leaves its pieces as they are."""
    match gating.engine:
        case GatingEngine.HEAD_ONLY:
            return HeadOnly(trunk, autocast)
        case GatingEngine.SINGLE_PASS:
            return SinglePass(
                trunk,
                autocast,
                activations=gating.row_activations,
                kv_gradient=gating.kv_gradient,
                compile_backend=compile_backend,
            )
        case GatingEngine.TWO_PASS:
            return TwoPass(
                trunk,
                autocast,
                activations=gating.row_activations,
                depth_buckets=gating.depth_buckets,
                compile_backend=compile_backend,
            )


class HeadOnly:
    """Backward through all rows of all blocks: exact for any rows."""

    def __init__(self, trunk: Trunk, autocast: Autocast) -> None:
        self._trunk = trunk
        self._autocast = autocast
        self._ends = Ends(trunk, autocast)

    def forward(self, batch: Batch) -> tuple[Tensor, Back]:
        """As Engine has it."""
        trunk, links = self._trunk, []
        with self._autocast():
            context = trunk.context(batch.tokens_BT, batch.documents_BT)
            with torch.no_grad():
                x_BTD = trunk.embed(batch.tokens_BT, context.places)
            for block in trunk.blocks:
                leaf_BTD = x_BTD.detach().requires_grad_()
                with torch.enable_grad():
                    x_BTD = block(leaf_BTD, context)
                links.append((block, leaf_BTD, x_BTD))
            with torch.no_grad():
                hidden_ND = trunk.norm(x_BTD).flatten(0, 1)
        top_ND = x_BTD.detach().flatten(0, 1)

        def back(rows_K: Tensor, gradient_KD: Tensor, sink: Sink, depth: Depth | None = None) -> None:
            if depth is not None:
                raise ValueError(
                    "depth: the HeadOnly engine goes back over all tokens alike; use SinglePass or TwoPass"
                )
            at_rows_KD = self._ends.back_over_norm(top_ND[rows_K], gradient_KD, sink)
            gradient_BTD = torch.zeros_like(top_ND).index_copy_(0, rows_K, at_rows_KD).view_as(x_BTD)
            while links:
                block, leaf_BTD, y_BTD = links.pop()
                (gradient_BTD,) = go_back(y_BTD, gradient_BTD, list(block.parameters()), sink, leaf_BTD)
            self._ends.back_over_embedding(batch.tokens_BT, context.places, gradient_BTD, sink)

        return hidden_ND, back
