"""AdamW over named parameters, with a clipped global norm, that skips a step whose gradients are not finite.

Calls torch's fused kernel itself instead of through torch.optim: that imports the compiler at the first optimizer,
seconds of CPU time at every start, and keeps state by number instead of name. The decision to skip is taken on the
device, which the kernel reads as it does for torch.amp.GradScaler, so no step waits for it. Gradients are summed
over ranks before, so every rank decides alike without a word.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor

from pylon_api.training import OptimizerSpec


class AdamW:
    """Decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101); vectors are not decayed."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], spec: OptimizerSpec) -> None:
        self._parameters = parameters
        self._spec = spec
        self._first_moments = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        self._second_moments = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        device = next(iter(parameters.values())).device
        self._updates = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)
        """Steps skipped since the process began."""
        self.skipped_in_row = torch.zeros((), device=device)
        """Steps skipped since the last one that was not."""

    @torch.no_grad()
    def update(self, learning_rate: float, smoothed: Container[str] = ()) -> Tensor:
        """Clip, then one step with this learning rate. Returns the global gradient norm before clipping (scalar).

        smoothed: names of gradients that carry a momentum already; for those beta1 is 0.
        """
        norm = torch.nn.utils.get_total_norm(named_gradients(self._parameters).values())
        if self._spec.gradient_clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self._parameters.values(), self._spec.gradient_clip_norm, norm)
        is_bad = (~torch.isfinite(norm)).float()
        self._updates += 1 - is_bad
        for is_matrix in (True, False):
            for is_smoothed in (True, False):
                names = [
                    name
                    for name, parameter in self._parameters.items()
                    if (parameter.dim() > 1) is is_matrix and (name in smoothed) is is_smoothed
                ]
                weight_decay = self._spec.weight_decay if is_matrix else 0.0
                beta1 = 0.0 if is_smoothed else self._spec.beta1
                self._apply(names, learning_rate, weight_decay, beta1, is_bad)
        self.skipped += is_bad
        self.skipped_in_row = (self.skipped_in_row + 1) * is_bad
        return norm

    def _apply(self, names: list[str], learning_rate: float, weight_decay: float, beta1: float, is_bad: Tensor) -> None:
        if not names:
            return
        torch._fused_adamw_(
            [self._parameters[name] for name in names],
            [gradient for name in names if (gradient := self._parameters[name].grad) is not None],
            [self._first_moments[name] for name in names],
            [self._second_moments[name] for name in names],
            [],
            [self._updates] * len(names),
            amsgrad=False,
            lr=learning_rate,
            beta1=beta1,
            beta2=self._spec.beta2,
            weight_decay=weight_decay,
            eps=self._spec.epsilon,
            maximize=False,
            grad_scale=None,
            found_inf=is_bad,
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of its state that ranks have alike, by name."""
        return {
            "updates": self._updates,
            **{f"first moment of {name}": moment for name, moment in self._first_moments.items()},
            **{f"second moment of {name}": moment for name, moment in self._second_moments.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """Both moments of every parameter by its name, and the number of updates. Not copies: whoever writes to them
        restores a state."""
        return {
            "updates": self._updates,
            "first_moments": dict(self._first_moments),
            "second_moments": dict(self._second_moments),
        }


def named_gradients(parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """The gradient of every trainable parameter; one that got none has zeros, so that all ranks exchange alike."""
    gradients: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients[name] = parameter.grad
    return gradients
