"""Training runs of equal wall-clock time: one model, many strategies, the real steps and their real time.

A run is given seconds, not steps. Its clock is the device's, read every few steps; it stands still while something
compiles. The learning rate follows the share of the time that has passed, so each run, however fast its steps, goes
through its whole schedule. Runs of one seed start from the same weights and see the same data in the same order, as
far as each gets.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from measure import Mark, compiled_graphs
from python_corpus import VOCABULARY, Ids
from torch import Tensor

from pylon_api.training import (
    Compile,
    DataSpec,
    GatingSpec,
    ModelSpec,
    OptimizerSpec,
    Precision,
    ScheduleSpec,
    TrainingSpec,
)
from pylon_trainer.checkpoint.state import separate
from pylon_trainer.control import Control, build_control
from pylon_trainer.gating import build_step
from pylon_trainer.gating.replay import Replay
from pylon_trainer.models import Decoder, build_model
from pylon_trainer.optim.curvature import Curvature, build_curvature
from pylon_trainer.optim.optimizer import Optimizer
from pylon_trainer.optim.schedule import learning_rate_ratio
from pylon_trainer.runtime.distributed import World
from pylon_trainer.step import Batch, TrainingStep

ROUND_STEPS = 16
"""Steps between two looks at the clock."""
WARM_STEPS = 64
"""Steps after which a strategy that still compiles something new is taken as it is."""
SCHEDULE_STEPS = 10_000
"""Schedules are written for this many steps; a run is at the one that its share of the time says."""


@dataclass(frozen=True)
class Scale:
    """Model and batch."""

    model: dict[str, Any]
    sequences: int
    tokens: int
    """Of a sequence."""


@dataclass(frozen=True)
class Strategy:
    name: str
    gating: dict[str, Any] = field(default_factory=dict)
    batch_share: float = 1.0
    """Share of the batch's sequences that a step takes."""
    time_factor: float = 1.0
    """Seconds that a run is given, as a multiple of the others'."""
    steps_of: str | None = None
    """Name of another strategy: train for as many steps as it took, however long that takes."""
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    """Its learning rate is the phase's."""


@dataclass(frozen=True)
class Phase:
    """A stage of training in which strategies are compared."""

    name: str
    kind: str
    """Kind of source in the corpus."""
    seconds: float
    """Of a run."""
    learning_rate: float
    schedule: ScheduleSpec


@dataclass(frozen=True)
class Snapshot:
    """Where runs of a phase start."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Any] | None
    """None: the moments start at zero."""


@dataclass(frozen=True)
class Outcome:
    loss: float
    """Held-out, nats per token."""
    seconds: float
    steps: int
    tokens: int
    ratio: float
    """Share of the tokens seen that carried gradient, over the whole run."""
    recompiles: int


class Alone(World):
    """A single rank, without a process group."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        """See World."""
        return tensor[None]

    def _reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
        pass


class Laboratory:
    """One model on which every run takes place."""

    def __init__(
        self,
        scale: Scale,
        corpus: Mapping[str, Ids],
        device: torch.device,
        compile: Compile,
        build: Callable[[], Decoder] | None = None,
    ) -> None:
        """build: makes the model, in place of the scale's Transformer."""
        self.scale = scale
        self._device = device
        self._compile = compile
        self._fresh_model = build or partial(build_model, ModelSpec.model_validate(scale.model), vocab_size=VOCABULARY)
        self.model = self._fresh_model().to(device)
        self._parameters = dict(self.model.named_parameters())
        self._windows = {name: self._cut(ids) for name, ids in corpus.items()}
        self._plain = self._build({})
        self._steps: dict[str, TrainingStep] = {}
        self._fresh: dict[str, dict[str, Any]] = {}
        self._step_s: dict[str, float] = {}

    def prepare(self, strategy: Strategy, kind: str) -> float:
        """Build and compile its step; returns the seconds of one, warm. The model's weights are spoiled."""
        step = self._plain if not strategy.gating else self._build(strategy.gating)
        fresh = copy.deepcopy(step.state_dict())
        optimizer = Optimizer(self._parameters, strategy.optimizer)
        curvature, control = self._curvature(optimizer, strategy.optimizer), self._control(step)
        batches = self._batches(strategy, kind, seed=0)
        warm = 0
        while warm < WARM_STEPS:
            graphs = _made(step)
            round_s = self._round(step, optimizer, curvature, control, batches, [1e-4] * ROUND_STEPS, first=warm)[0]
            warm += ROUND_STEPS
            if _made(step) == graphs:
                break
        self._steps[strategy.name] = step
        self._fresh[strategy.name] = fresh
        self._step_s[strategy.name] = round_s / ROUND_STEPS
        return self._step_s[strategy.name]

    def start(self, seed: int) -> Snapshot:
        """Fresh weights."""
        torch.manual_seed(seed)
        return Snapshot({name: p.detach() for name, p in self._fresh_model().named_parameters()}, None)

    @torch.no_grad()
    def _restore(self, snapshot: Snapshot, spec: OptimizerSpec) -> Optimizer:
        for name, parameter in self._parameters.items():
            parameter.copy_(snapshot.weights[name])
        optimizer = Optimizer(self._parameters, spec)
        if snapshot.optimizer is not None:
            saved = separate(snapshot.optimizer)[1]
            for key, tensor in separate(optimizer.state_dict())[1].items():
                tensor.copy_(saved[key])
        return optimizer

    def train(
        self, strategy: Strategy, phase: Phase, seed: int, snapshot: Snapshot, steps: int | None = None
    ) -> tuple[Outcome, Snapshot]:
        """One run from a snapshot, and where it ended. With `steps`, that many instead of the phase's seconds."""
        optimizer = self._restore(snapshot, strategy.optimizer)
        curvature = self._curvature(optimizer, strategy.optimizer)
        step, step_s = self._steps[strategy.name], self._step_s[strategy.name]
        step.load_state_dict(self._fresh[strategy.name])
        control = self._control(step)
        batches = self._batches(strategy, phase.kind, seed)
        budget_s = phase.seconds * strategy.time_factor
        clock_s, done, recompiles = 0.0, 0, 0
        gated = torch.zeros((), dtype=torch.int64, device=self._device)
        while (left := _steps_left(steps, done, budget_s - clock_s, step_s)) > 0:
            count = min(ROUND_STEPS, left)
            if steps is not None:
                shares = [(done + i) / steps for i in range(count)]
            else:
                shares = [min((clock_s + i * step_s) / budget_s, 1.0) for i in range(count)]
            graphs = _made(step)
            rates = [phase.learning_rate * _rate(phase.schedule, share) for share in shares]
            round_s, gated_tokens = self._round(step, optimizer, curvature, control, batches, rates, first=done)
            if _made(step) == graphs:
                step_s = round_s / count
            recompiles += _made(step) - graphs
            gated += gated_tokens
            clock_s += step_s * count
            done += count
        tokens = done * self._sequences(strategy) * self.scale.tokens
        loss = self._held_out_loss(phase.kind)
        end = Snapshot({n: p.detach().clone() for n, p in self._parameters.items()}, optimizer.state_dict())
        return Outcome(loss, clock_s, done, tokens, int(gated) / max(tokens, 1), recompiles), end

    def _round(
        self,
        step: TrainingStep,
        optimizer: Optimizer,
        curvature: Curvature | None,
        control: Control | None,
        batches: Iterator[Batch],
        rates: list[float],
        *,
        first: int,
    ) -> tuple[float, Tensor]:
        """One step for each learning rate; the seconds they took together, and the tokens that carried gradient."""
        gated = torch.zeros((), dtype=torch.int64, device=self._device)
        begin = Mark(self._device)
        for number, rate in enumerate(rates, first):
            batch = next(batches)
            result = step.forward_backward(batch, global_tokens=batch.labels_BT.numel(), step=number)
            with control.around_update(number, batch, [result], rate) if control else nullcontext():
                optimizer.update(rate)
            for parameter in self._parameters.values():
                parameter.grad = None
            if curvature:
                curvature.follow([batch], batch.labels_BT.numel(), number + 1)
            gated += result.gated_tokens
        end = Mark(self._device)
        end.wait()
        return begin.milliseconds_to(end) / 1e3, gated

    def _held_out_loss(self, kind: str) -> float:
        windows_WT = self._windows[f"{kind}_held_out"]
        whole = len(windows_WT) // self.scale.sequences * self.scale.sequences  # a part of a batch would recompile
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        for part_BT in windows_WT[:whole].split(self.scale.sequences):
            loss_sum += self._plain.evaluate(_batch(part_BT)).loss_sum
        return float(loss_sum) / (whole * self.scale.tokens)

    def _build(self, gating: dict[str, Any]) -> TrainingStep:
        return build_step(self.model, self._training(gating=GatingSpec.model_validate(gating)), self._device)

    def _control(self, step: TrainingStep) -> Control | None:
        """One that knows nothing yet, where the model asks for it."""
        torch.manual_seed(0)
        alone = Alone(0, 1, 0, self._device)
        return build_control(alone, self._training(model=self.model.spec), self.model, step, self._parameters)

    def _curvature(self, optimizer: Optimizer, spec: OptimizerSpec) -> Curvature | None:
        alone = World(0, 1, 0, self._device)
        return build_curvature(alone, self._training(optimizer=spec), self.model, optimizer, self._parameters)

    def _training(self, **fields: Any) -> TrainingSpec:
        return TrainingSpec(
            data=DataSpec(train=["unused"]),
            schedule=ScheduleSpec(steps=1),
            precision=Precision.BFLOAT16 if self._device.type == "cuda" else Precision.FLOAT32,
            compile=self._compile,
            **fields,
        )

    def _cut(self, ids: Ids) -> Tensor:
        """Windows of a sequence and the token after it, W x (T + 1)."""
        width = self.scale.tokens + 1
        whole = ids[: len(ids) // width * width].astype(np.int32)
        return torch.from_numpy(whole).view(-1, width).to(self._device)

    def _sequences(self, strategy: Strategy) -> int:
        return round(self.scale.sequences * strategy.batch_share)

    def _batches(self, strategy: Strategy, kind: str, seed: int) -> Iterator[Batch]:
        """Without end; every epoch in an order of its own, drawn from the seed."""
        windows_WT = self._windows[f"{kind}_train"]
        sequences = self._sequences(strategy)
        generator = np.random.default_rng(seed)
        while True:
            order_W = torch.from_numpy(generator.permutation(len(windows_WT))).to(self._device)
            for start in range(0, len(order_W) - sequences + 1, sequences):
                yield _batch(windows_WT[order_W[start : start + sequences]])


def _made(step: TrainingStep) -> int:
    """How much has been compiled in this process, and recorded of this step: what takes time once."""
    run = getattr(step, "run", None)
    recordings = run.recordings.values() if isinstance(run, Replay) else ()
    return compiled_graphs() + sum(recording is not None for recording in recordings)


def _steps_left(steps: int | None, done: int, left_s: float, step_s: float) -> int:
    """Of `steps`, or of the time that is left; a run has at least one."""
    if steps is not None:
        return steps - done
    return max(round(left_s / step_s), 0 if done else 1)


def _batch(windows_BT: Tensor) -> Batch:
    windows_BT = windows_BT.long()
    return Batch(windows_BT[:, :-1].contiguous(), windows_BT[:, 1:].contiguous())


def _rate(schedule: ScheduleSpec, share: float) -> float:
    return learning_rate_ratio(schedule, min(int(share * SCHEDULE_STEPS), SCHEDULE_STEPS - 1), SCHEDULE_STEPS)
