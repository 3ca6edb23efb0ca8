"""Training steps: one forward and backward pass of a model, plain or gated, behind the loop's one interface.

The pass is cut at the hidden states: the head runs in chunks of rows, each with its own small backward pass, so that
the logits of a large vocabulary never live at once; the collected gradient then flows through the blocks. The gated
step reads its scores from the logits without gradient and spends the head's backward pass on selected rows only; how
much of the blocks' backward pass they spare is the engine's business (engine.py).

Shapes: N = B * T tokens of a micro-batch, K of them selected, D hidden width, V vocabulary, C rows of one chunk.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pylon_api.run import GateDecision, GateReport
from pylon_api.training import Compile, GatingSelection, GatingSpec, GatingStrategy, Precision, TrainingSpec
from pylon_trainer.gating import difficulty
from pylon_trainer.gating.cost import saved_flops_ratio
from pylon_trainer.gating.engine import build_engine, send_back
from pylon_trainer.gating.scores import SCORES, Score, entropy, gradient_norm
from pylon_trainer.gating.scores import loss as losses
from pylon_trainer.gating.selection import Selection, sample, top
from pylon_trainer.models import Transformer
from pylon_trainer.step import IGNORED, Batch, StepResult, TrainingStep

LOGITS_PER_CHUNK = 2**25
"""Logits of one chunk: 128 MiB in float32, enough rows to keep a GPU busy at any vocabulary."""

WARMUP_RATIOS = 16
"""While the ratio falls it moves in sixteenths, so that only a few shapes occur."""


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

    def forward_backward(self, batch: Batch, *, global_tokens: int, step: int) -> StepResult:  # noqa: ARG002
        """As TrainingStep has it."""
        hidden_ND = self._hidden(batch)
        labels_N = batch.labels_BT.flatten()
        weights_N = torch.ones_like(labels_N, dtype=torch.float32)
        loss_sum, gradient_ND = self._head_backward(hidden_ND.detach(), labels_N, weights_N, global_tokens)
        send_back(hidden_ND, gradient_ND)
        tokens = (labels_N != IGNORED).sum()
        return StepResult(loss_sum, tokens, tokens)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> StepResult:
        """As TrainingStep has it."""
        labels_N = batch.labels_BT.flatten()
        losses_N = self._judge(self._hidden(batch), labels_N, [losses])[0]
        tokens = (labels_N != IGNORED).sum()
        return StepResult(losses_N.sum(), tokens, torch.zeros_like(tokens))

    def report(self) -> GateReport | None:
        """None: there is no gate."""
        return None

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

    def _logits(self, hidden_CD: Tensor) -> Tensor:
        with self._autocast():
            return self.model.head(hidden_CD).float()

    def _rows_per_chunk(self) -> int:
        return max(1, LOGITS_PER_CHUNK // self.model.vocab_size)

    @torch.no_grad()
    def _judge(self, hidden_ND: Tensor, labels_N: Tensor, judges: list[Score]) -> list[Tensor]:
        """What each judge says of every row, from the logits without gradient; 0 where there is no label."""
        rows = self._rows_per_chunk()
        verdicts: list[list[Tensor]] = []
        for hidden_CD, labels_C in zip(hidden_ND.split(rows), labels_N.split(rows), strict=True):
            logits_CV = self._logits(hidden_CD)
            labelled_C = labels_C != IGNORED
            known_C = labels_C.clamp_min(0)
            verdicts.append([torch.where(labelled_C, judge(logits_CV, known_C), 0.0) for judge in judges])
        return [torch.cat(parts) for parts in zip(*verdicts, strict=True)]

    def _head_backward(
        self, hidden_KD: Tensor, labels_K: Tensor, weights_K: Tensor, global_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """Backward through the head, chunk by chunk; returns the weighted loss and the gradient at the rows, K x D."""
        rows = self._rows_per_chunk()
        loss_sum = weights_K.new_zeros(())
        gradients = []
        for hidden_CD, labels_C, weights_C in zip(
            hidden_KD.split(rows), labels_K.split(rows), weights_K.split(rows), strict=True
        ):
            leaf_CD = hidden_CD.detach().requires_grad_()
            losses_C = F.cross_entropy(self._logits(leaf_CD), labels_C, ignore_index=IGNORED, reduction="none")
            loss = (losses_C * weights_C).sum()
            (loss / max(global_tokens, 1)).backward()
            loss_sum += loss.detach()
            assert leaf_CD.grad is not None
            gradients.append(leaf_CD.grad)
        return loss_sum, torch.cat(gradients)


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
        self._gating = training.gating
        self._sequence_length = training.data.sequence_length
        self._seed = training.seed
        self._rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        self._step = -1
        self._micro_batch = 0

    def forward_backward(self, batch: Batch, *, global_tokens: int, step: int) -> StepResult:
        """As TrainingStep has it."""
        self._micro_batch = self._micro_batch + 1 if step == self._step else 0
        self._step = step
        ratio = token_ratio(self._gating, step)
        if ratio == 1:
            return super().forward_backward(batch, global_tokens=global_tokens, step=step)
        hidden_ND, back = self._engine.forward(batch)
        labels_N = batch.labels_BT.flatten()
        judges = [losses, gradient_norm, entropy, SCORES[self._gating.strategy]]
        losses_N, norms_N, entropies_N, scores_N = self._judge(hidden_ND, labels_N, judges)
        rows_K, weights_K = self._select(scores_N, labels_N != IGNORED, math.ceil(ratio * len(labels_N)))
        _, gradient_KD = self._head_backward(hidden_ND[rows_K], labels_N[rows_K], weights_K, global_tokens)
        back(rows_K, gradient_KD)
        tokens = (labels_N != IGNORED).sum()
        tally = difficulty.measure(norms_N, entropies_N, labels_N != IGNORED)
        return StepResult(losses_N.sum(), tokens, tokens.clamp_max(len(rows_K)), tally)

    def report(self) -> GateReport | None:
        """As TrainingStep has it."""
        ratio = token_ratio(self._gating, max(self._step, 0))
        if ratio == 1:
            return GateReport(decision=GateDecision.PLAIN, reason="every token carries gradient at ratio 1", ratio=1)
        saved = saved_flops_ratio(
            self.model.spec,
            self._gating,
            vocab_size=self.model.vocab_size,
            sequence_length=self._sequence_length,
            ratio=ratio,
        )
        return GateReport(
            decision=GateDecision.GATED,
            reason=f"ratio {ratio:g}, as training.gating sets it",
            ratio=ratio,
            saved_flops_ratio=saved,
        )

    def _select(self, scores_N: Tensor, labelled_N: Tensor, rows: int) -> Selection:
        """Drawn from seed, step, rank and micro-batch alone, so that a resumed run draws the same."""
        draws = np.random.default_rng([self._seed, self._step, self._rank, self._micro_batch])
        if self._gating.selection is GatingSelection.SAMPLED:
            return sample(scores_N, labelled_N, rows=rows, start=float(draws.random()))
        if self._gating.strategy is GatingStrategy.RANDOM:
            generator = torch.Generator(self._device).manual_seed(int(draws.integers(2**62)))
            scores_N = torch.rand(len(scores_N), generator=generator, device=self._device)
        return top(scores_N, labelled_N, rows=rows)


def token_ratio(gating: GatingSpec, step: int) -> float:
    """Share of tokens that carry gradient at a step (from 0): falls from 1 to gating.token_ratio over the warm-up."""
    if step >= gating.warmup_steps:
        return gating.token_ratio
    falling = 1 - (1 - gating.token_ratio) * step / gating.warmup_steps
    return max(gating.token_ratio, math.ceil(falling * WARMUP_RATIOS) / WARMUP_RATIOS)
