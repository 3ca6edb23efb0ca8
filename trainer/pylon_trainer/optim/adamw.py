"""AdamW over named parameters, with a clipped global norm, that skips a step whose gradients are not finite.

The decision to skip is taken on the device: the fused kernel reads it, as it does for torch.amp.GradScaler, so no step
waits for the device. Gradients are summed over ranks before, so every rank decides alike without a word.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pylon_api.training import OptimizerSpec
from pylon_trainer.errors import ConfigError


class AdamW:
    """Decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101); vectors are not decayed."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], spec: OptimizerSpec) -> None:
        self._parameters = parameters
        self._spec = spec
        matrices = [p for p in parameters.values() if p.dim() > 1]
        vectors = [p for p in parameters.values() if p.dim() <= 1]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": spec.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=spec.learning_rate,
            betas=(spec.beta1, spec.beta2),
            eps=spec.epsilon,
            fused=True,
        )
        device = next(iter(parameters.values())).device
        self.skipped = torch.zeros((), device=device)
        """Steps skipped since the process began."""
        self.skipped_in_row = torch.zeros((), device=device)
        """Steps skipped since the last one that was not."""

    def update(self, learning_rate: float) -> Tensor:
        """Clip, then one step with this learning rate. Returns the global gradient norm before clipping (scalar)."""
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._spec.gradient_clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self._parameters.values(), self._spec.gradient_clip_norm, norm)
        is_bad = (~torch.isfinite(norm)).float()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.found_inf = is_bad  # type: ignore[attr-defined]
        self._optimizer.step()
        self.skipped += is_bad
        self.skipped_in_row = (self.skipped_in_row + 1) * is_bad
        return norm

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Moments and step count of every parameter by its name; empty before the first step."""
        return {
            name: dict(self._optimizer.state[parameter])
            for name, parameter in self._parameters.items()
            if parameter in self._optimizer.state
        }

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Restore what state_dict gave. ConfigError naming the first parameter that differs."""
        for name, moments in state.items():
            parameter = self._parameters.get(name)
            if parameter is None:
                raise ConfigError(f"the checkpoint's optimizer holds {name}, which this model has not")
            self._optimizer.state[parameter] = {
                key: value.to(parameter.device, copy=True) for key, value in moments.items()
            }


def named_gradients(parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """The gradient of every trainable parameter; one that got none has zeros, so that all ranks exchange alike."""
    gradients: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients[name] = parameter.grad
    return gradients
