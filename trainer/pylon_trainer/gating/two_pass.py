"""TwoPass: a forward pass of all tokens that keeps their keys and values only, then a second one of the chosen rows,
with a graph. Memory for activations falls with the rows.

With depths, a row enters the second pass at the first block that its gradient reaches, from the hidden state that the
first pass kept there: one for each depth.

Shapes: B sequences, T tokens, N = B * T, K chosen rows, M of them that reach a block, D hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pylon_api.training import RowActivations
from pylon_trainer.gating.depth import Depth, blocks_over
from pylon_trainer.gating.ends import Autocast, Back, Ends, precision_of
from pylon_trainer.gating.gradients import Sink, go_back
from pylon_trainer.gating.pieces import Backend, Kept, Pieces
from pylon_trainer.gating.rows import Rows
from pylon_trainer.gating.trunk import Trunk
from pylon_trainer.step import Batch


class TwoPass:
    """Forward of everything, then forward and backward of the chosen rows."""

    def __init__(
        self,
        trunk: Trunk,
        autocast: Autocast,
        *,
        activations: RowActivations,
        depth_buckets: int,
        compile_backend: Backend,
    ) -> None:
        self._trunk = trunk
        self._autocast = autocast
        self._ends = Ends(trunk, autocast)
        self._keeps = activations is RowActivations.KEEP
        self._pieces = Pieces(compile_backend)
        self._parameters = [list(block.parameters()) for block in trunk.blocks]
        layers = len(trunk.blocks)
        self._borders = {layers - blocks_over(layers, depth_buckets, bucket) for bucket in range(1, depth_buckets)}

    @torch.no_grad()
    def forward(self, batch: Batch) -> tuple[Tensor, Back]:
        """As Engine has it."""
        blocks = self._trunk.blocks
        trail: list[Kept] = []
        entering: dict[int, Tensor] = {}
        with self._autocast():
            context = self._trunk.context(batch.tokens_BT, batch.documents_BT)
            x_BTD = self._trunk.embed(batch.tokens_BT, context.places)
            precision = precision_of(x_BTD.device)
            for number, block in enumerate(blocks):
                if number in self._borders:
                    entering[number] = x_BTD
                x_BTD, kept = self._pieces.run(block, x_BTD, context, precision, False)
                trail.append(kept)
            hidden_ND = self._trunk.norm(x_BTD).flatten(0, 1)

        def back(rows_K: Tensor, gradient_KD: Tensor, sink: Sink, depth: Depth | None = None) -> None:
            narrowings = {} if depth is None else depth.narrowings(len(blocks))
            passing = [Rows.of(rows_K, context, batch.tokens_BT)]  # by the number of blocks above them
            for over in range(1, len(blocks) + 1):
                rows = passing[-1]
                passing.append(rows.narrow(narrowings[over].kept_R) if over in narrowings else rows)
            lowest = passing[-1]

            with torch.no_grad(), self._autocast():
                x_1MD = self._trunk.embed(lowest.tokens_K, lowest.places_K).unsqueeze(0)
            links: list[tuple[Tensor, Tensor]] = []
            for number, (block, kept) in enumerate(zip(blocks, trail, strict=True)):
                over = len(blocks) - number
                if over in narrowings:
                    x_1MD = passing[over - 1].take(entering[number]).index_copy(1, narrowings[over].kept_R, x_1MD)
                leaf_1MD = x_1MD.detach().requires_grad_()
                with torch.set_grad_enabled(self._keeps), self._autocast():
                    x_1MD = self._pieces.run_rows(block, leaf_1MD, passing[over - 1], kept, precision)
                links.append((leaf_1MD, x_1MD))

            gradient_1MD = self._ends.back_over_norm(x_1MD, gradient_KD.unsqueeze(0), sink)
            for over, (block, parameters) in enumerate(
                reversed([*zip(blocks, self._parameters, strict=True)]), start=1
            ):
                (leaf_1MD, y_1MD), kept = links.pop(), trail.pop()
                if not self._keeps:
                    with torch.enable_grad(), self._autocast():
                        y_1MD = self._pieces.run_rows(block, leaf_1MD, passing[over - 1], kept, precision)
                (gradient_1MD,) = go_back(y_1MD, gradient_1MD, parameters, sink, leaf_1MD)
                if over in narrowings:
                    gradient_1MD = narrowings[over].carry(gradient_1MD)
            self._ends.back_over_embedding(lowest.tokens_K, lowest.places_K, gradient_1MD.squeeze(0), sink)

        return hidden_ND, back
