"""Training steps: one forward and backward pass of a model, plain or gated, behind the loop's one interface.

A step is cut in three. The engine (engine.py) runs the blocks and knows a way back from chosen rows; the head (head.py)
gives scores, loss and gradient of rows; the gate (gate.py) chooses the rows.

Shapes: N = B * T tokens of a micro-batch, K of them chosen, D hidden width.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pylon_api.run import GateDecision, GateReport
from pylon_api.training import Compile, TrainingSpec
from pylon_trainer.gating import difficulty
from pylon_trainer.gating.cost import saved_flops_ratio
from pylon_trainer.gating.engine import build_engine
from pylon_trainer.gating.gate import Draws, build_gate
from pylon_trainer.gating.gradients import accumulate, frozen, go_back, send_back
from pylon_trainer.gating.head import Head
from pylon_trainer.gating.ratio import PLAIN
from pylon_trainer.gating.replay import Number, Runner, run_at_once
from pylon_trainer.gating.scores import judge
from pylon_trainer.kernels.head import poison
from pylon_trainer.kernels.score import Scores
from pylon_trainer.models import Decoder
from pylon_trainer.step import IGNORED, Batch, StepResult


class PlainStep:
    """Every labelled token carries gradient."""

    def __init__(
        self, model: Decoder, device: torch.device, precision: torch.dtype | None, run: Runner = run_at_once
    ) -> None:
        self.model: Decoder = model
        self._device = device
        self._precision = precision
        self.run = run

    def forward_backward(self, batch: Batch, *, global_tokens: int, step: int) -> StepResult:  # noqa: ARG002
        """As TrainingStep has it."""
        return self.run("plain", self._plain, batch, max(global_tokens, 1))[0]

    def _plain(
        self,
        batch: Batch,
        global_tokens: Number,
        *,
        weights_N: Tensor | None = None,
        wants_scores: bool = False,
        head: Head | None = None,
    ) -> tuple[StepResult, Scores | None]:
        """Forward and backward pass with all rows; their scores, if wanted, come from the same logits. weights_N: None
        for 1. head: None for one of its own."""
        hidden_ND, labels_N = self._hidden(batch), batch.labels_BT.flatten()
        weights_N = torch.ones_like(labels_N, dtype=torch.float32) if weights_N is None else weights_N
        loss_sum, gradient_ND, nonfinite_rows, scores = (head or self._head()).backward(
            hidden_ND, labels_N, weights_N, global_tokens, accumulate, wants_scores=wants_scores
        )
        send_back(hidden_ND, gradient_ND)
        tokens = (labels_N != IGNORED).sum()
        tally = None if scores is None else _tally(scores, labels_N)
        return StepResult(loss_sum, tokens, tokens, nonfinite_rows, tally), scores

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> StepResult:
        """As TrainingStep has it."""
        labels_N = batch.labels_BT.flatten()
        losses_N, _, nonfinite_rows = self._head().cross_entropy(self._hidden(batch), labels_N)
        tokens = (labels_N != IGNORED).sum()
        return StepResult(losses_N.sum() * poison(nonfinite_rows), tokens, torch.zeros_like(tokens), nonfinite_rows)

    @torch.no_grad()
    def draw_labels(self, batch: Batch) -> Batch:
        """The batch with labels drawn from the model's own distribution, wherever there is one to learn."""
        hidden_BTD = self._hidden(batch).view(*batch.tokens_BT.shape, -1)
        drawn = []
        for hidden_TD in hidden_BTD:  # one sequence's logits at a time
            with self._autocast():
                logits_TV = self.model.head(hidden_TD)
            weights_TV = logits_TV.float().softmax(-1)
            drawn.append((weights_TV / torch.empty_like(weights_TV).exponential_()).argmax(-1))
        labels_BT = torch.where(batch.labels_BT == IGNORED, IGNORED, torch.stack(drawn))
        return dataclasses.replace(batch, labels_BT=labels_BT)

    def sense(self, batch: Batch, advice: Tensor) -> tuple[Tensor, Tensor]:
        """As TrainingStep has it."""
        labels_N = batch.labels_BT.flatten()
        tokens = (labels_N != IGNORED).sum().clamp_min(1)
        weights_N = torch.ones_like(labels_N, dtype=torch.float32)
        with frozen(self.model.parameters()):
            advice.requires_grad_()
            hidden_ND = self._hidden(batch)
            loss_sum, gradient_ND, _, _ = self._head().backward(hidden_ND, labels_N, weights_N, tokens, accumulate)
            (gradient,) = go_back(hidden_ND, gradient_ND, [], accumulate, advice)
            advice.requires_grad_(False)
        return loss_sum / tokens, gradient

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

    def _head(self) -> Head:
        return Head(self.model, self._precision)

    def _hidden(self, batch: Batch) -> Tensor:
        with self._autocast():
            hidden_BTD: Tensor = self.model(batch.tokens_BT, batch.documents_BT)
        return hidden_BTD.flatten(0, 1)


class GatedStep(PlainStep):
    """A share of the tokens carries gradient: those that a score, read from the model's own logits, selects."""

    def __init__(
        self,
        model: Decoder,
        device: torch.device,
        precision: torch.dtype | None,
        training: TrainingSpec,
        run: Runner = run_at_once,
    ) -> None:
        super().__init__(model, device, precision, run)
        backend = None if training.compile is Compile.OFF else "inductor"
        self._engine = build_engine(model, training.gating, self._autocast, compile_backend=backend)
        self._training = training
        self._gate = build_gate(training.gating, seed=training.seed, device=device)

    def forward_backward(self, batch: Batch, *, global_tokens: int, step: int) -> StepResult:
        """As TrainingStep has it."""
        gate = self._gate
        ratio = gate.begin(step)
        wants_scores, numbers = gate.needs_scores, [float(max(global_tokens, 1))]
        if ratio == PLAIN:
            work = partial(self._plain, wants_scores=wants_scores)
        else:
            work = partial(self._gated, ratio=ratio, wants_scores=wants_scores)
            numbers += map(float, gate.draw())
        result, scores = self.run((ratio, gate.opened_tiers, wants_scores), work, batch, *numbers)
        gate.count_nonfinite(result.nonfinite_rows)
        if scores is not None:
            scores_N = judge(self._training.gating.strategy, scores)
            gate.observe(scores_N, scores.gradient_norm_N, batch.labels_BT != IGNORED, scores.nonfinite_rows)
        return result

    def _gated(
        self,
        batch: Batch,
        global_tokens: Number,
        rows_start: Number,
        leaks_start: Number,
        *,
        ratio: float,
        wants_scores: bool,
    ) -> tuple[StepResult, Scores | None]:
        """Forward pass of all rows, backward pass of those that the gate chooses; the scores of all, if wanted."""
        draws = Draws(rows_start, leaks_start)
        labels_N, labelled_BT = batch.labels_BT.flatten(), batch.labels_BT != IGNORED
        head = self._head()
        hidden_ND, back = self._engine.forward(batch)
        scores = head.score(hidden_ND, labels_N)
        scores_N = judge(self._training.gating.strategy, scores)
        rows_K, weights_K = self._gate.choose(scores_N, labelled_BT, ratio, draws)
        result_K = head.backward(
            hidden_ND[rows_K], labels_N[rows_K], weights_K, global_tokens, accumulate, scores.take(rows_K)
        )
        back(rows_K, result_K.gradient_KD, accumulate, self._gate.depth(scores_N, labelled_BT.flatten(), rows_K, draws))
        tokens = labelled_BT.sum()
        loss_sum = scores.loss_N.sum() * poison(scores.nonfinite_rows)
        result = StepResult(
            loss_sum, tokens, tokens.clamp_max(len(rows_K)), scores.nonfinite_rows, _tally(scores, labels_N)
        )
        return result, scores if wants_scores else None

    def report(self) -> GateReport:
        """As TrainingStep has it: what the gate says, and what its ratio spares with this model and engine."""
        report = self._gate.report()
        if report.decision is GateDecision.PLAIN:
            return report
        training = self._training
        saved = saved_flops_ratio(
            self.model.spec,
            training.gating,
            vocab_size=self.model.vocab_size,
            sequence_length=training.data.sequence_length,
            ratio=self._share(report.ratio),
        )
        return report.model_copy(update={"saved_flops_ratio": saved})

    def _share(self, ratio: float) -> float:
        """Of the tokens that carry gradient at a ratio."""
        return ratio

    def state_dict(self) -> dict[str, Any]:
        """As TrainingStep has it: what the gate knows."""
        return self._gate.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As TrainingStep has it."""
        self._gate.load_state_dict(state)


def _tally(scores: Scores, labels_N: Tensor) -> Tensor:
    return difficulty.measure(scores.gradient_norm_N, scores.entropy_N, labels_N != IGNORED)
