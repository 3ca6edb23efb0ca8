"""The parts of one run and how they take a step together: forward and backward, exchange, clip and update, exchange."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from pylon_api.run import RunConfig
from pylon_trainer.consensus import Exchange
from pylon_trainer.consensus.agreement import Agreement, refuse_disagreement
from pylon_trainer.consensus.build import build_exchange
from pylon_trainer.control import Control, build_control
from pylon_trainer.data import TrainingData
from pylon_trainer.gating import build_step
from pylon_trainer.models import Decoder, build_model
from pylon_trainer.models.resonate.upkeep import Upkeep
from pylon_trainer.optim.curvature import Curvature, build_curvature
from pylon_trainer.optim.optimizer import Optimizer, named_gradients
from pylon_trainer.optim.schedule import learning_rate_ratio, total_steps
from pylon_trainer.runtime.distributed import World
from pylon_trainer.runtime.seeds import make_deterministic, seed_everything
from pylon_trainer.step import Batch, StepResult, TrainingStep
from pylon_trainer.thaw import Thaw


@dataclass(frozen=True, slots=True)
class Update:
    """What one optimizer step gave; tensors stay on the device so that reading them can wait."""

    results: list[StepResult]
    """One of each micro-batch."""
    gradient_norm: Tensor
    learning_rate: float


@dataclass(slots=True)
class Run:
    """Everything that changes while training, and its position."""

    config: RunConfig
    world: World
    data: TrainingData
    model: Decoder
    training_step: TrainingStep
    parameters: dict[str, torch.nn.Parameter]
    optimizer: Optimizer
    exchange: Exchange
    agreement: Agreement
    control: Control | None
    curvature: Curvature | None
    upkeep: Upkeep
    thaw: Thaw
    total_steps: int
    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Labelled tokens trained on, over all ranks."""

    def micro_batches(self, batch: Batch) -> list[Batch]:
        """The parts of a batch that are forwarded one after the other, on the device."""
        size = self.config.training.batch.micro_sequences or len(batch.tokens_BT)
        return [part.to(self.world.device) for part in batch.split(size)]

    def advance(self, batch: Batch, global_tokens: int, before_update: Callable[[], None] = lambda: None) -> Update:
        """One optimizer step on this rank's batch. Collective.

        global_tokens: labelled tokens of this step over all ranks, so that the summed gradients are those of the mean.
        before_update: called once gradients are there and before exchange, parameters and optimizer change.
        """
        schedule = self.config.training.schedule
        ratio = learning_rate_ratio(schedule, self.step, self.total_steps)
        learning_rate = self.config.training.optimizer.learning_rate * ratio
        self.thaw.begin_step(self.step)
        parts = self.micro_batches(batch)
        results = [
            self.training_step.forward_backward(part, global_tokens=global_tokens, step=self.step) for part in parts
        ]
        before_update()
        gradients = named_gradients(self.parameters)
        with self.control.around_update(self.step, parts[0], results, learning_rate) if self.control else nullcontext():
            self.exchange.exchange(gradients)
            gradient_norm = self.optimizer.update(learning_rate, smoothed=self.exchange.smoothed)
        self.exchange.after_update(is_last=self.step + 1 == self.total_steps)
        for parameter in self.parameters.values():
            parameter.grad = None
        self.step += 1
        self.thaw.end_step(self.step, learning_rate)
        if self.upkeep.end_step(self.step) and self.control:
            self.control.hold(self.step)
        self.tokens += global_tokens
        if self.curvature:
            self.curvature.follow(parts, global_tokens, self.step)
        return Update(results, gradient_norm, learning_rate)


def build(config: RunConfig, world: World, data: TrainingData) -> Run:
    """A run at step 0: the same weights on every rank, because all draw them from the same seed."""
    training = config.training
    make_deterministic()
    seed_everything(training.seed)
    model = build_model(training.model, vocab_size=data.vocab_size).to(world.device)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    training_step = build_step(model, training, world.device)
    control = build_control(world, training, model, training_step, parameters)
    seed_everything(training.seed, world.rank + 1)
    refuse_disagreement(world, config, {**dict(model.named_parameters()), **dict(model.named_buffers())})
    optimizer = Optimizer(parameters, training.optimizer)
    exchange = build_exchange(world, training, parameters, control.turn_bytes if control else 0)
    thaw = Thaw(model, training.optimizer, world)
    alike = {**(exchange.replicas or {**parameters, **optimizer.tensors}), **thaw.tensors}
    if control:
        alike.update(control.tensors)
    return Run(
        config=config,
        world=world,
        data=data,
        model=model,
        training_step=training_step,
        parameters=parameters,
        optimizer=optimizer,
        exchange=exchange,
        agreement=Agreement(world, alike, training.consensus.on_disagreement),
        control=control,
        curvature=build_curvature(world, training, model, optimizer, parameters),
        upkeep=Upkeep(model, world, training.seed),
        thaw=thaw,
        total_steps=total_steps(training.schedule, training.batch.sequences * training.data.sequence_length),
    )
