"""Training steps with a checkpoint begun among them, and when each of them ended on the device.

Nothing here waits for the device but where a stretch of steps ends. Each step leaves a mark in the device's own order
of work; the time between two marks is what a step took, with all that held it up: a host that was busy saving, a copy
that it had to wait for, memory or cores that it had to share. The host may run two steps ahead, as in training.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from gate_step import Shape, step_of
from measure import Mark
from torch import Tensor

from pylon_api.training import Compile, OptimizerSpec
from pylon_trainer.optim.optimizer import Optimizer

State = dict[str, dict[str, Tensor]]
"""Group (model, first_moments, ...), name, tensor; not copies."""

Samples = dict[tuple[str, str], Tensor]
"""Values by group and name."""

STEPS_IN_FLIGHT = 2
PLAIN_STEPS = 5
"""Before each save. The first of them waits for its first kernels to be launched and is not counted."""
LEARNING_RATE = 1e-4


class Save(Protocol):
    """One checkpoint under way. Times are of time.perf_counter."""

    copied_s: float | None
    """When the state had been copied; None before, and where no moment can be told."""
    durable_s: float | None
    """When the checkpoint was durable and committed."""

    def is_done(self) -> bool:
        """Whether it is durable and committed. Raises what the save failed of."""
        ...


class Engine(Protocol):
    """One way to save a state, to directories below a URI, while training goes on to change it."""

    def begin(self, number: int) -> Save:
        """Save the state as it is once all steps asked for so far have been taken."""
        ...

    def release(self) -> None:
        """Called before the state is changed: make sure, or see to it on the device, that it is copied."""
        ...

    def read(self, number: int, group: str, name: str) -> Tensor:
        """One tensor of a committed save."""
        ...

    def remove(self, number: int) -> None:
        """Remove a committed save from the store."""
        ...

    def close(self) -> None:
        """Give back memory, threads and processes."""
        ...


class Training:
    """A model with its optimizer and batch that takes whole steps: forward, backward, clipping and AdamW."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device = device
        model = shape.build().to(device)
        self._batch = shape.batch(shape.sequences, device)
        self._training_step = step_of(model, device, Compile.DEFAULT if device.type == "cuda" else Compile.OFF, {})
        self._parameters = dict(model.named_parameters())
        self._optimizer = Optimizer(self._parameters, OptimizerSpec())
        self._steps = 0
        moments = self._optimizer.state_dict()
        self.state: State = {
            "model": {name: parameter.detach() for name, parameter in self._parameters.items()},
            "first_moments": moments["first_moments"],
            "second_moments": moments["second_moments"],
            "optimizer": {"updates": moments["updates"]},
        }
        self.state_bytes = sum(tensor.nbytes for group in self.state.values() for tensor in group.values())

    def step(self, release: Callable[[], None] = lambda: None) -> Mark:
        """A whole step, its end marked. `release` is called between backward and update."""
        self._training_step.forward_backward(self._batch, global_tokens=self._batch.labels_BT.numel(), step=self._steps)
        release()
        self._optimizer.update(LEARNING_RATE)
        for parameter in self._parameters.values():
            parameter.grad = None
        self._steps += 1
        return Mark(self.device)

    def samples(self) -> Samples:
        """Copies of the last tensor of each group as they will be once all steps asked for so far have been taken."""
        last = {group: next(reversed(tensors)) for group, tensors in self.state.items()}
        return {(group, name): self.state[group][name].clone() for group, name in last.items()}

    def warm_up(self) -> None:
        """Compile, and let the allocator settle."""
        for _ in range(3):
            self.step().wait()


@dataclass(frozen=True)
class Timeline:
    """A stretch of steps with one save among them, in seconds of one clock."""

    ends_s: list[float]
    """When each step ended on the device."""
    begun: int
    """Steps asked for when the save began; the step of this index is the first that had to share with it."""
    begun_s: float
    copied_s: float | None
    durable_s: float

    @property
    def ready_s(self) -> float:
        """When both the call had been made and the state to save was there: a host that runs ahead asks earlier."""
        return max(self.begun_s, self.ends_s[self.begun - 1])

    @property
    def plain_s(self) -> list[float]:
        return self._durations(1, self.begun)

    @property
    def first_s(self) -> float:
        """The step in which the save began and its copy was waited for."""
        return self._durations(self.begun, self.begun + 1)[0]

    @property
    def upload_s(self) -> list[float]:
        """Steps after that which began before the save was over."""
        later = range(self.begun + 1, len(self.ends_s))
        return [self.ends_s[i] - self.ends_s[i - 1] for i in later if self.ends_s[i - 1] < self.durable_s]

    def _durations(self, first: int, last: int) -> list[float]:
        return [self.ends_s[i] - self.ends_s[i - 1] for i in range(first, last)]


def save_among_steps(training: Training, engine: Engine, number: int) -> tuple[Timeline, Samples]:
    """Plain steps, then a save, then steps until it is over. Also samples of what is to be in the save."""
    origin = Mark(training.device)
    origin.wait()
    origin_s = time.perf_counter()  # ties the device's clock to the host's
    marks: list[Mark] = []

    def advance() -> None:
        if len(marks) >= STEPS_IN_FLIGHT:
            marks[-STEPS_IN_FLIGHT].wait()
        marks.append(training.step(engine.release))

    for _ in range(PLAIN_STEPS):
        advance()
    samples = training.samples()
    begun_s = time.perf_counter()
    save = engine.begin(number)
    advance()
    while not save.is_done():
        advance()
    marks[-1].wait()
    assert save.durable_s is not None, "a save that is done says when it was"
    ends_s = [origin_s + origin.milliseconds_to(mark) / 1e3 for mark in marks]
    return Timeline(ends_s, PLAIN_STEPS, begun_s, save.copied_s, save.durable_s), samples
