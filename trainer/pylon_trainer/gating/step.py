"""Training steps: one forward and backward pass of a model, plain or gated, behind the loop's one interface.

A step is cut in three. The engine (engine.py) runs the blocks and knows a way back from chosen rows; the head (head.py)
gives scores, loss and gradient of rows; the gate (gate.py) chooses the rows.

Shapes: N = B * T tokens of a micro-batch, K of them chosen, D hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pylon_api.training import Compile, GatingStrategy, Precision, TrainingSpec
from pylon_trainer.gating.engine import build_engine
from pylon_trainer.gating.gate import Gate
from pylon_trainer.gating.gradients import accumulate, send_back
from pylon_trainer.gating.head import Head
from pylon_trainer.gating.scores import SCORES
from pylon_trainer.gating.scores import loss as losses
from pylon_trainer.models import Transformer
from pylon_trainer.step import IGNORED, Batch, StepResult, TrainingStep


def build_step(model: Transformer, training: TrainingSpec, device: torch.device) -> TrainingStep:
    """The step that `training` asks for, around a model that is already on `device`.

    Autocast and compilation of the blocks are the step's own business; the caller need not wrap anything.
    """
    if training.compile is Compile.DEFAULT:
        for block in model.blocks:
            block.compile()
    precision = torch.bfloat16 if training.precision is Precision.BFLOAT16 else None
    if training.gating.strategy is GatingStrategy.OFF:
        return PlainStep(model, device, precision)
    return GatedStep(model, device, precision, training)


class PlainStep:
    """Every labelled token carries gradient."""

    def __init__(self, model: Transformer, device: torch.device, precision: torch.dtype | None) -> None:
        self.model: Transformer = model
        self._device = device
        self._precision = precision
        self._head = Head(model, self._autocast)

    def forward_backward(self, batch: Batch, *, global_tokens: int, step: int) -> StepResult:  # noqa: ARG002
        """As TrainingStep has it."""
        hidden_ND = self._hidden(batch)
        labels_N = batch.labels_BT.flatten()
        weights_N = torch.ones_like(labels_N, dtype=torch.float32)
        loss_sum, gradient_ND = self._head.backward(hidden_ND.detach(), labels_N, weights_N, global_tokens)
        send_back(hidden_ND, gradient_ND)
        tokens = (labels_N != IGNORED).sum()
        return StepResult(loss_sum, tokens, tokens)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> StepResult:
        """As TrainingStep has it."""
        labels_N = batch.labels_BT.flatten()
        losses_N = self._head.judge(self._hidden(batch), labels_N, [losses])[0]
        tokens = (labels_N != IGNORED).sum()
        return StepResult(losses_N.sum(), tokens, torch.zeros_like(tokens))

    def state_dict(self) -> dict[str, Any]:
        """Empty: everything follows from seed, step and rank."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self._device.type, dtype=self._precision, enabled=self._precision is not None, cache_enabled=False
        )

    def _hidden(self, batch: Batch) -> Tensor:
        with self._autocast():
            hidden_BTD: Tensor = self.model(batch.tokens_BT, batch.documents_BT)
        return hidden_BTD.flatten(0, 1)


class GatedStep(PlainStep):
    """A share of the tokens carries gradient: those that a score, read from the model's own logits, selects."""

    def __init__(
        self,
        model: Transformer,
        device: torch.device,
        precision: torch.dtype | None,
        training: TrainingSpec,
    ) -> None:
        super().__init__(model, device, precision)
        self._engine = build_engine(model, training, self._autocast)
        self._score = SCORES[training.gating.strategy]
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        self._gate = Gate(training.gating, seed=training.seed, rank=rank)

    def forward_backward(self, batch: Batch, *, global_tokens: int, step: int) -> StepResult:
        """As TrainingStep has it."""
        ratio = self._gate.begin(step)
        if ratio == 1:
            return super().forward_backward(batch, global_tokens=global_tokens, step=step)
        hidden_ND, back = self._engine.forward(batch)
        labels_N = batch.labels_BT.flatten()
        losses_N, scores_N = self._head.judge(hidden_ND, labels_N, [losses, self._score])
        rows_K, weights_K = self._gate.choose(scores_N, labels_N != IGNORED, ratio)
        _, gradient_KD = self._head.backward(hidden_ND[rows_K], labels_N[rows_K], weights_K, global_tokens)
        back(rows_K, gradient_KD, accumulate)
        tokens = (labels_N != IGNORED).sum()
        return StepResult(losses_N.sum(), tokens, tokens.clamp_max(len(rows_K)))
