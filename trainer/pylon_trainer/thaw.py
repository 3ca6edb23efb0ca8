"""Thaw: the dense base of an adapted model, which begins to learn at some step and is exchanged rarely.

From then on every rank adds up its gradients of the base; every baseSyncSteps they are summed over ranks, exactly, and
make one update of the base by an optimizer of its own. So replicas stay equal at every step, and a step's share of the
bytes is small; in exchange the base moves once where everything else moves baseSyncSteps times.

The price: a gradient and the optimizer's state for the base, from the start, and a copy of the gradient in each rank's
part of a checkpoint. What is added up when training ends is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pylon_api.training import OptimizerSpec
from pylon_trainer.consensus import KEPT
from pylon_trainer.models.decoder import Decoder
from pylon_trainer.optim.optimizer import Optimizer, named_gradients
from pylon_trainer.runtime.distributed import World


class Thaw:
    """Of one model; does nothing when its base stays as it is."""

    def __init__(self, model: Decoder, optimizer: OptimizerSpec, world: World) -> None:
        self._world = world
        adaptation = model.spec.adaptation
        self._first, self._every = (adaptation.unfreeze_step, adaptation.base_sync_steps) if adaptation else (None, 1)
        frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
        self.parameters = {} if self._first is None else frozen
        self._optimizer = Optimizer(self.parameters, optimizer) if self.parameters else None

    def begin(self) -> None:
        """See Optimizer."""
        if self._optimizer is not None:
            self._optimizer.begin()

    def begin_step(self, done: int) -> None:
        """Before the forward pass of a step, when so many are done."""
        if self._first is not None and done >= self._first:
            for parameter in self.parameters.values():
                parameter.requires_grad_(True)

    def end_step(self, done: int, learning_rate: float) -> None:
        """After the step that makes it so many. Collective when an exchange is due."""
        if self._optimizer is None or self._first is None or done <= self._first or (done - self._first) % self._every:
            return
        for gradient in named_gradients(self.parameters).values():
            self._world.sum(gradient).div_(self._every)
        self._optimizer.update(learning_rate)
        for gradient in named_gradients(self.parameters).values():
            gradient.zero_()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that ranks have alike, by name."""
        own = {} if self._optimizer is None else self._optimizer.tensors
        return {**self.parameters, **{f"base's {name}": tensor for name, tensor in own.items()}}

    def optimizer_state(self) -> dict[str, Any]:
        """Equal on all ranks; not copies."""
        return {} if self._optimizer is None else self._optimizer.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """What this rank has added up: copies, because the way back adds to it while a checkpoint is written."""
        return {name: {KEPT: gradient.clone()} for name, gradient in named_gradients(self.parameters).items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; {} is the start."""
        for name, gradient in named_gradients(self.parameters).items():
            if name in state:
                gradient.copy_(state[name][KEPT])
