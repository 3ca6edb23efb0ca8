"""From gradients to updates: clip the global norm, let a rule or two move the parameters, count what was left out.

A step whose gradients are not finite changes nothing. The decision is taken on the device, so no step waits for it.
Gradients are summed over ranks before, so every rank decides alike without a word. What an update is, the rules say
(rule.py); this knows which parameter follows which.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import Tensor

from pylon_api.training import OptimizerName, OptimizerSpec
from pylon_trainer.optim.adafactor import Adafactor
from pylon_trainer.optim.adamw import AdamW
from pylon_trainer.optim.lion import Lion
from pylon_trainer.optim.lookahead import Lookahead
from pylon_trainer.optim.muon import Muon, is_hidden_matrix
from pylon_trainer.optim.rule import Group, Rule, State, Step
from pylon_trainer.optim.sophia import Sophia


class Optimizer:
    """Every parameter under its rule. Vectors are not decayed."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], spec: OptimizerSpec) -> None:
        self._parameters = parameters
        self._spec = spec
        self._rules = _rules(parameters, spec)
        self._lookahead = Lookahead(parameters, spec.lookahead) if spec.lookahead else None
        device = next(iter(parameters.values())).device
        self._updates = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)
        """Steps skipped since the process began."""
        self.skipped_in_row = torch.zeros((), device=device)
        """Steps skipped since the last one that was not."""

    def begin(self) -> None:
        """Start at the weights there are by now, which were read after this was built. It has made no update yet."""
        if self._lookahead:
            self._lookahead.begin()

    @torch.no_grad()
    def update(self, learning_rate: float, smoothed: Container[str] = ()) -> Tensor:
        """Clip, then one step with this learning rate. Returns the global gradient norm before clipping (scalar).

        smoothed: names of gradients that carry a momentum already; to those no rule adds its own. Gradients are used
        up: what they hold afterwards means nothing.
        """
        gradients = named_gradients(self._parameters)
        norm = torch.nn.utils.get_total_norm(gradients.values())
        is_bad = _not_finite(norm)
        self._updates += 1 - is_bad
        step = Step(learning_rate, self._updates, is_bad, self._divisor(norm))
        for rule in self._rules:
            for group in self._groups(rule, gradients, smoothed):
                rule.apply(group, step)
        if self._lookahead:
            self._lookahead.follow(self._updates, is_bad)
        self.skipped += is_bad
        self.skipped_in_row = (self.skipped_in_row + 1) * is_bad
        return norm

    @torch.no_grad()
    def observe_drawn(self, tokens: int) -> None:
        """Take gradients as those of labels that the model drew, mean over so many tokens; Sophia alone wants them."""
        gradients = named_gradients(self._parameters)
        is_bad = _not_finite(torch.nn.utils.get_total_norm(gradients.values()))
        for rule in self._rules:
            if isinstance(rule, Sophia):
                rule.observe(gradients, tokens, is_bad)

    def _divisor(self, norm: Tensor) -> Tensor | None:
        """The inverse of what torch.nn.utils.clip_grad_norm_ multiplies by, for kernels that divide."""
        limit = self._spec.gradient_clip_norm
        return ((norm + 1e-6) / limit).clamp(min=1) if limit > 0 else None

    def _groups(self, rule: Rule, gradients: dict[str, Tensor], smoothed: Container[str]) -> Iterator[Group]:
        for is_matrix in (True, False):
            for is_smoothed in (True, False):
                own = {
                    name: parameter
                    for name, parameter in rule.parameters.items()
                    if (parameter.dim() > 1) is is_matrix and (name in smoothed) is is_smoothed
                }
                if own:
                    weight_decay = self._spec.weight_decay if is_matrix else 0.0
                    values = [gradients[name] for name in own]
                    yield Group(list(own), list(own.values()), values, weight_decay, is_smoothed)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of its state that ranks have alike, by name."""
        named = {
            f"{kind.removesuffix('s').replace('_', ' ')} of {name}": tensor
            for kind, own in self._state.items()
            for name, tensor in own.items()
        }
        return {"updates": self._updates, **named}

    def state_dict(self) -> dict[str, Any]:
        """What each parameter's rule remembers of it, by its name, and the number of updates. Not copies: whoever
        writes to them restores a state."""
        return {"updates": self._updates, **self._state}

    @property
    def _state(self) -> State:
        states: list[State] = [rule.state for rule in self._rules]
        if self._lookahead:
            states.append(self._lookahead.state)
        kinds = {kind: None for state in states for kind in state}
        return {kind: {name: t for state in states for name, t in state.get(kind, {}).items()} for kind in kinds}


def named_gradients(parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """The gradient of every trainable parameter; one that got none has zeros, so that all ranks exchange alike."""
    gradients: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients[name] = parameter.grad
    return gradients


def _not_finite(norm: Tensor) -> Tensor:
    return (~torch.isfinite(norm)).float()


def _rules(parameters: dict[str, torch.nn.Parameter], spec: OptimizerSpec) -> list[Rule]:
    """Each parameter under one."""
    match spec.name:
        case OptimizerName.ADAMW:
            return [AdamW(parameters, spec)]
        case OptimizerName.MUON:
            hidden = {name: p for name, p in parameters.items() if is_hidden_matrix(name, p.shape)}
            others = {name: p for name, p in parameters.items() if name not in hidden}
            return [Muon(hidden, spec), AdamW(others, spec)]
        case OptimizerName.ADAFACTOR:
            return [Adafactor(parameters, spec)]
        case OptimizerName.LION:
            return [Lion(parameters, spec)]
        case OptimizerName.SOPHIA:
            return [Sophia(parameters, spec)]
