"""Kinds of steps that take turns on one model, and what is seen of each: time, memory, waits, recompilation."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from measure import Mark, compiled_graphs, host_syncs
from plain_baselines import Trainable
from step_flops import StepFlops
from torch import Tensor

from pylon_api.training import OptimizerSpec
from pylon_trainer.models import Decoder
from pylon_trainer.optim.optimizer import Optimizer, named_gradients
from pylon_trainer.step import Batch

ROUNDS = 4
STEPS_OF_TURN = 3
"""The first step of a turn waits for its first kernels to be launched and is not counted."""


@dataclass
class Kind:
    """One way to take a step, and what was seen of it."""

    name: str
    ratio: float
    build: Callable[[], Trainable]
    flops: Future[StepFlops]
    granularity: str = "token"
    is_plain: bool = False
    step: Trainable = field(init=False)
    """There once it is warm."""
    step_ms: list[float] = field(default_factory=list)
    forward_backward_ms: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    persistent_bytes: int | None = None
    """Weights, gradients and optimizer state."""
    syncs: int | None = None
    recompiles: int = 0
    gradient_difference: float | None = None
    """Norm of the difference to the plain step's gradients, as a share of theirs; at ratio 1 only."""


class Bench:
    """A model with its optimizer and batch, on which all kinds take their steps."""

    def __init__(self, model: Decoder, batch: Batch) -> None:
        self.model = model
        self.batch = batch
        self.device = batch.tokens_BT.device
        self._parameters = dict(model.named_parameters())
        self._optimizer = Optimizer(self._parameters, OptimizerSpec())
        self._steps = 0

    def backward(self, kind: Kind) -> None:
        """Forward and backward; gradients stay."""
        kind.step.forward_backward(self.batch, global_tokens=self.batch.labels_BT.numel(), step=self._steps)
        self._steps += 1

    def step(self, kind: Kind) -> tuple[Mark, Mark, Mark]:
        """A whole step; when it began, when its gradients were there, when it ended."""
        begin = Mark(self.device)
        self.backward(kind)
        middle = Mark(self.device)
        self._optimizer.update(0.0)
        for parameter in self._parameters.values():
            parameter.grad = None
        return begin, middle, Mark(self.device)

    def gradient_difference(self, kind: Kind, other: Kind) -> float:
        """Norm of the difference of two kinds' gradients, as a share of the other's."""
        own, others = self._gradients(kind), self._gradients(other)
        difference = torch.nn.utils.get_total_norm([own[name] - others[name] for name in others])
        return float(difference / torch.nn.utils.get_total_norm(others.values()))

    def _gradients(self, kind: Kind) -> dict[str, Tensor]:
        self.backward(kind)
        gradients = dict(named_gradients(self._parameters))
        self.model.zero_grad()
        return gradients

    def warm_up(self, kind: Kind) -> None:
        """Build and compile, then see memory, waits for the device and, at ratio 1, gradients."""
        start = time.perf_counter()
        kind.step = kind.build()
        for _ in range(3):
            self.step(kind)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.step(kind)
            kind.peak_bytes = torch.cuda.max_memory_allocated()
            kind.persistent_bytes = 4 * sum(p.numel() * p.element_size() for p in self._parameters.values())
            kind.syncs = host_syncs(lambda: self.step(kind))
        seconds = time.perf_counter() - start
        peak = f", peak {kind.peak_bytes / 2**30:.1f} GiB" if kind.peak_bytes else ""
        print(f"  {kind.name} {kind.ratio}: compiled and warm after {seconds:.1f} s{peak}", flush=True)

    def measure_alone(self, kind: Kind) -> None:
        """All turns of a kind at once; then it is forgotten, with all that it holds."""
        self.warm_up(kind)
        kind.peak_bytes = None  # the allocator does not see what a replayed graph writes
        for _ in range(ROUNDS):
            self.take_turn(kind)
        del kind.step
        gc.collect()

    def take_turn(self, kind: Kind) -> None:
        graphs = compiled_graphs()
        marks = [self.step(kind) for _ in range(STEPS_OF_TURN)][1:]
        marks[-1][-1].wait()
        kind.step_ms += [begin.milliseconds_to(end) for begin, _, end in marks]
        kind.forward_backward_ms += [begin.milliseconds_to(middle) for begin, middle, _ in marks]
        kind.recompiles += compiled_graphs() - graphs
