"""A gated step of a Hugging Face model: what its forward pass becomes while it trains.

The losses of all tokens come from one forward pass without a graph, so what is logged is the true loss of the batch.
Which rows carry gradient is decided when the gradient of those losses arrives; head and blocks then go back from the
chosen rows alone. A step that the gate leaves plain is the model's own forward, untouched, and so is every call without
labels, without gradients or outside training.

Shapes: B sequences, T tokens, N = B * T, K chosen rows.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers.modeling_outputs import CausalLMOutputWithPast

from pylon_api.run import GateReport
from pylon_api.training import GatingSpec
from pylon_trainer.gating.depth import Depth
from pylon_trainer.gating.gate import Gate, build_gate
from pylon_trainer.gating.gradients import Sink
from pylon_trainer.gating.head import Head
from pylon_trainer.gating.ratio import PLAIN
from pylon_trainer.gating.scores import judge
from pylon_trainer.gating.selection import Selection, all_rows
from pylon_trainer.huggingface.detour import detour
from pylon_trainer.huggingface.engine import ModelEngine
from pylon_trainer.huggingface.families import check
from pylon_trainer.huggingface.request import Request, has_labels, read
from pylon_trainer.kernels.score import Scores
from pylon_trainer.step import IGNORED


@dataclass
class GatedOutput(CausalLMOutputWithPast):
    """A loss without logits. Beside it, what TRL's trainers read of each token, zero where there is no label."""

    log_probs: Tensor | None = None
    """float32 B x T-1, with gradients: log-probability of each label."""
    entropy: Tensor | None = None
    """float32 B x T-1: entropy of each prediction, nats."""
    is_top1: Tensor | None = None
    """bool B x T-1: whether the label was the likeliest token."""
    label_mask: Tensor | None = None
    """bool B x T-1: whether there is a label."""


class GatedModel:
    """The gate of one model, and the forward that takes the place of the model's own."""

    def __init__(self, model: Any, gating: GatingSpec, seed: int) -> None:
        check(model)
        self.step = 0
        """Optimizer steps so far."""
        self.calls = 0
        """Training calls with labels: none while training tells that another forward has taken its place."""
        self.is_enabled = True
        self.last: tuple[Scores, Selection] | None = None
        """What the last forward pass saw and chose; None when it was the model's own."""
        self._model = model
        self._gating = gating
        self._usual = model.forward
        self._argument_names = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]
        self._seed = seed
        self._is_nonfinite_told = False

    def __getstate__(self) -> dict[str, Any]:
        # What belongs to a device and a process is built again: a copy of the model measures anew.
        return {name: x for name, x in vars(self).items() if name not in ("_gate", "_engine")} | {"last": None}

    @cached_property
    def _engine(self) -> ModelEngine:
        return ModelEngine(self._model, self._gating)

    @cached_property
    def _gate(self) -> Gate:
        """Built when it is first asked, as the model may move to another device before."""
        return build_gate(self._gating, seed=self._seed, device=self._model.device)

    def report(self) -> GateReport:
        """What the gate does, and why."""
        return self._gate.report()

    def figures(self) -> dict[str, float]:
        """The report's numbers as a trainer logs them."""
        report = self.report()
        figures = {"gate_ratio": report.ratio, "gate_retained_mass": report.retained_mass}
        return {name: figure for name, figure in figures.items() if figure is not None}

    def is_trained_by(self, stepped: Container[int]) -> bool:
        """Whether it is enabled and the first parameter that trains is among those with these ids."""
        first = next((parameter for parameter in self._model.parameters() if parameter.requires_grad), None)
        return self.is_enabled and first is not None and id(first) in stepped

    def count(self) -> None:
        """The optimizer has made a step. Warns when the gate is passed by, and once when logits are no numbers."""
        name = type(self._model).__name__
        if not self.calls:
            warnings.warn(
                f"{name} is trained, but its gate was never asked for a loss: another forward has taken its place, or "
                "labels do not reach it; call enable() after whatever replaces it, with the trainer itself where there "
                "is one",
                stacklevel=2,
            )
        elif not self._is_nonfinite_told and self.report().nonfinite_steps:
            self._is_nonfinite_told = True
            warnings.warn(
                f"{name}: some logits are NaN or infinite; gated micro-batches with such a logit add no gradient. "
                "Lower the learning rate or train in bfloat16",
                stacklevel=2,
            )
        self.step += 1

    def forward(self, *positional: Any, **named: Any) -> Any:
        """What the model's own forward gives, with its gradient spent on the rows that the gate chooses."""
        arguments = dict(zip(self._argument_names, positional, strict=False)) | named
        ratio = self._ratio(arguments)
        if ratio is None:
            return self._usual(*positional, **named)
        return self._answer(arguments, ratio)

    # Not by dynamo: a model compiled as a whole keeps its graph in plain steps, and steps out of it for gated ones.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _ratio(self, arguments: Mapping[str, Any]) -> float | None:
        """Share of the tokens whose gradient is wanted; None when the model's own forward is to run."""
        self.last = None
        if not (self.is_enabled and has_labels(arguments) and self._model.training and torch.is_grad_enabled()):
            return None
        self.calls += 1
        ratio = self._gate.begin(self.step)
        return None if ratio == PLAIN and not self._gate.needs_scores else ratio

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _answer(self, arguments: Mapping[str, Any], ratio: float) -> GatedOutput | tuple[Tensor]:
        request = read(arguments, self._engine.trunk.window)
        labels_BT = request.batch.labels_BT
        labelled_BT = labels_BT != IGNORED
        losses_N, scores = self._losses(request, labelled_BT, ratio)
        loss = losses_N.sum() / request.divisor
        if arguments.get("return_dict") is False:
            return (loss,)
        is_top1_N = scores.loss_N.neg().exp() >= scores.confidence_N
        return GatedOutput(
            loss=loss,
            log_probs=-losses_N.view_as(labels_BT)[:, :-1],
            entropy=scores.entropy_N.view_as(labels_BT)[:, :-1],
            is_top1=(is_top1_N.view_as(labels_BT) & labelled_BT)[:, :-1],
            label_mask=labelled_BT[:, :-1],
        )

    def _losses(self, request: Request, labelled_BT: Tensor, ratio: float) -> tuple[Tensor, Scores]:
        """Losses of all tokens, whose gradients come from the rows that the gate chooses."""
        hidden_ND, back = self._engine.forward(request)
        labels_N = request.batch.labels_BT.flatten()
        head = Head(self._engine.trunk, self._engine.precision)
        scores = head.score(hidden_ND, labels_N)
        selection, depth = self._choose(scores, labelled_BT, ratio)
        self.last = scores, selection
        rows_K, weights_K = selection

        def way_back(gradient_N: Tensor, sink: Sink) -> None:
            def keep(parameter: Parameter, gradient: Tensor) -> None:
                # A logit that is no number makes all gradients NaN, and a trainer's step would take them.
                sink(parameter, torch.where(scores.nonfinite_rows == 0, gradient, 0))

            # What the loss was divided or multiplied by is in the gradient.
            weighted_K = weights_K * gradient_N[rows_K]
            result = head.backward(hidden_ND[rows_K], labels_N[rows_K], weighted_K, 1, keep, scores.take(rows_K))
            back(rows_K, result.gradient_KD, keep, depth)

        return detour(scores.loss_N, way_back, self._engine.trainable()), scores

    def _choose(self, scores: Scores, labelled_BT: Tensor, ratio: float) -> tuple[Selection, Depth | None]:
        scores_N = judge(self._gating.strategy, scores)
        self._gate.count_nonfinite(scores.nonfinite_rows)
        self._gate.observe(scores_N, scores.gradient_norm_N, labelled_BT, scores.nonfinite_rows)
        if ratio == PLAIN:
            return all_rows(labelled_BT), None
        draws = self._gate.draw()
        selection = self._gate.choose(scores_N, labelled_BT, ratio, draws)
        return selection, self._gate.depth(scores_N, labelled_BT.flatten(), selection.rows_K, draws)
