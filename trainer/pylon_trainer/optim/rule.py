"""What the rules that turn gradients into updates share: the step they are in, two ways to write, and how to begin.

A step whose gradients are not finite is left out on the device, so that no step waits for it. Whoever writes to
parameters or state therefore does it by a kernel that looks at `Step.is_bad` itself: torch's fused AdamW, or its fused
SGD, which `move` and `blend` put to use. Between them a rule may compute anything; what comes of gradients that are not
finite goes nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

BATCH_VALUES = 2**26
"""Values of parameters that a rule takes at a time: enough to fill a device, few enough to need little memory."""

State = dict[str, dict[str, Tensor]]
"""By what it is (`first_moments`), then by the parameter's name. Names in the plural: checkpoints have them."""


@dataclass(frozen=True, slots=True)
class Step:
    """One update, as all rules see it. Scalars are float32, on the device."""

    learning_rate: float
    updates: Tensor
    """Updates so far, with this one, and without those that were left out."""
    is_bad: Tensor
    """1 when the update is to be left out, else 0."""
    divisor: Tensor | None
    """What gradients are divided by so that their global norm keeps to its limit; None: there is no limit."""

    def clip(self, gradients: list[Tensor]) -> None:
        """Divide them, in place."""
        if self.divisor is not None:
            torch._foreach_div_(gradients, self.divisor)

    def move(self, tensors: list[Tensor], directions: list[Tensor], rate: float, decay: float) -> None:
        """tensor -= rate * (direction + decay * tensor), unless the step is bad."""
        _descend(tensors, directions, rate, decay, ascends=False, is_skipped=self.is_bad)

    def blend(self, averages: list[Tensor], values: list[Tensor], share: float | Tensor) -> None:
        """average += share * (value - average), unless the step is bad."""
        blend(averages, values, share, is_skipped=self.is_bad)


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that a rule updates alike. Their gradients are its to use up."""

    names: list[str]
    parameters: list[Tensor]
    gradients: list[Tensor]
    weight_decay: float
    is_smoothed: bool
    """Whether gradients carry a momentum already, so that the rule must not add another."""

    def batches(self) -> Iterator[Group]:
        """Parts of it whose parameters have one shape, of about BATCH_VALUES values."""
        places: dict[torch.Size, list[int]] = {}
        for place, parameter in enumerate(self.parameters):
            places.setdefault(parameter.shape, []).append(place)
        for shape, alike in places.items():
            size = max(1, BATCH_VALUES // max(1, shape.numel()))
            for start in range(0, len(alike), size):
                yield self._take(alike[start : start + size])

    def _take(self, places: list[int]) -> Group:
        return Group(
            [self.names[place] for place in places],
            [self.parameters[place] for place in places],
            [self.gradients[place] for place in places],
            self.weight_decay,
            self.is_smoothed,
        )


class Rule(Protocol):
    """How some parameters follow their gradients."""

    @property
    def parameters(self) -> Mapping[str, torch.nn.Parameter]:
        """Those that are its own."""
        ...

    @property
    def state(self) -> State:
        """All that it remembers: the same tensors at all times, zero at the start."""
        ...

    def apply(self, group: Group, step: Step) -> None:
        """One update of some of its parameters."""
        ...


def blend(averages: list[Tensor], values: list[Tensor], share: float | Tensor, is_skipped: Tensor) -> None:
    """average += share * (value - average), unless is_skipped is 1: that is ascent on the values, decay 1."""
    _descend(averages, values, share, 1.0, ascends=True, is_skipped=is_skipped)


def or_default(given: float | None, default: float) -> float:
    """A constant of a rule: the spec's where it gives one, be it 0."""
    return default if given is None else given


def zeros_like(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State of one value for each of a parameter's."""
    return {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}


def _descend(
    tensors: list[Tensor],
    directions: list[Tensor],
    rate: float | Tensor,
    decay: float,
    *,
    ascends: bool,
    is_skipped: Tensor,
) -> None:
    """torch's fused SGD without momentum. It returns at once, on the device, when found_inf is 1."""
    torch._fused_sgd_(
        tensors,
        directions,
        [],
        weight_decay=decay,
        momentum=0.0,
        lr=rate,
        dampening=0.0,
        nesterov=False,
        maximize=ascends,
        is_first_step=False,
        grad_scale=None,
        found_inf=is_skipped,
    )
