"""SinglePass: one forward pass of all tokens without a graph; on the way back each block runs again on the chosen rows,
with a graph that lives for that block.

Shapes: B sequences, T tokens, N = B * T, K chosen rows, M of them that go on, D hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from pylon_api.training import KvGradient, RowActivations
from pylon_trainer.gating.depth import Depth
from pylon_trainer.gating.ends import Autocast, Back, Ends, precision_of
from pylon_trainer.gating.gradients import Sink, go_back
from pylon_trainer.gating.pieces import Backend, Kept, Pieces
from pylon_trainer.gating.rows import Rows
from pylon_trainer.gating.trunk import Block, Trunk
from pylon_trainer.models.context import Context
from pylon_trainer.step import Batch


class SinglePass:
    """Backward through the chosen rows alone."""

    def __init__(
        self,
        trunk: Trunk,
        autocast: Autocast,
        *,
        activations: RowActivations,
        kv_gradient: KvGradient,
        compile_backend: Backend,
    ) -> None:
        self._trunk = trunk
        self._autocast = autocast
        self._ends = Ends(trunk, autocast)
        self._keeps = activations is RowActivations.KEEP
        self._is_dense = kv_gradient is KvGradient.DENSE
        self._pieces = Pieces(compile_backend)
        # Gathered once: walking a block's modules takes longer than a small block does.
        self._parameters = [list(block.parameters()) for block in trunk.blocks]

    @torch.no_grad()
    def forward(self, batch: Batch) -> tuple[Tensor, Back]:
        """As Engine has it."""
        trunk = self._trunk
        trail: list[tuple[Block, list[Parameter], Tensor, Kept]] = []
        with self._autocast():
            context = trunk.context(batch.tokens_BT, batch.documents_BT)
            x_BTD = trunk.embed(batch.tokens_BT, context.places)
            precision = precision_of(x_BTD.device)
            for block, parameters in zip(trunk.blocks, self._parameters, strict=True):
                y_BTD, kept = self._pieces.run(block, x_BTD, context, precision, self._keeps)
                trail.append((block, parameters, x_BTD, kept))
                x_BTD = y_BTD
            hidden_ND = trunk.norm(x_BTD).flatten(0, 1)

        def back(rows_K: Tensor, gradient_KD: Tensor, sink: Sink, depth: Depth | None = None) -> None:
            rows = Rows.of(rows_K, context, batch.tokens_BT)
            narrowings = {} if depth is None else depth.narrowings(len(trail))
            gradient_1MD = self._ends.back_over_norm(rows.take(x_BTD), gradient_KD.unsqueeze(0), sink)
            for over in range(1, len(trail) + 1):
                gradient_1MD = self._back_over(*trail.pop(), context, precision, rows, gradient_1MD, sink)
                if over in narrowings:
                    rows, gradient_1MD = rows.narrow(narrowings[over].kept_R), narrowings[over].carry(gradient_1MD)
            self._ends.back_over_embedding(rows.tokens_K, rows.places_K, gradient_1MD.squeeze(0), sink)

        return hidden_ND, back

    @torch.enable_grad()
    def _back_over(
        self,
        block: Block,
        parameters: list[Parameter],
        x_BTD: Tensor,
        kept: Kept,
        context: Context,
        precision: torch.dtype | None,
        rows: Rows,
        gradient_1MD: Tensor,
        sink: Sink,
    ) -> Tensor:
        """The gradient at the rows of a block's input."""
        if not self._is_dense:
            leaf_1MD = rows.take(x_BTD).requires_grad_()
            with self._autocast():
                y_1MD = self._pieces.run_rows(block, leaf_1MD, rows, kept, precision)
            (gradient_1MD,) = go_back(y_1MD, gradient_1MD, parameters, sink, leaf_1MD)
            return gradient_1MD
        leaf_BTD = x_BTD.detach().requires_grad_()
        with self._autocast():
            kept = kept._replace(offered=self._pieces.offers(block, leaf_BTD, context, kept, precision))
            y_1MD = self._pieces.run_rows(block, rows.take(leaf_BTD), rows, kept, precision)
        (gradient_BTD,) = go_back(y_1MD, gradient_1MD, parameters, sink, leaf_BTD)
        return rows.take(gradient_BTD)
