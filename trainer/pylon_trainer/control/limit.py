"""The limit: no step moves a block by more than a share of its weights, whatever the optimizer asks for.

It looks at the parameters before and after the update, so it knows no optimizer and every one will do. A block that
would go too far goes in the same direction as far as it may; one that would not is not touched. Decided on the device,
every step, without waiting. It takes a copy of the weights from before the update until after it, when activations are
gone, and about ten passes over them.

Shapes: G groups (the blocks, and last all that is in none), N tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from pylon_trainer.consensus.groups import Kind, kind_of


class Moved(NamedTuple):
    """What became of a step."""

    ratio_G: Tensor
    """Update as a share of the weights, before the limit."""
    steps: list[Tensor]
    """N: what was added to each tensor, after it."""


class Limit:
    """On the tensors of one model."""

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        """parameters: by name; those of block b are called blocks.b.*, among the first's a codebook that all share."""
        self._parameters: list[Tensor] = list(parameters.values())
        blocks = [_block_of(name, parameter) for name, parameter in parameters.items()]
        self.groups = max(blocks) + 2
        device = self._parameters[0].device
        self._group_N = torch.tensor(blocks, device=device) % self.groups
        self._member_GN = (torch.arange(self.groups, device=device)[:, None] == self._group_N).float()

    @torch.no_grad()
    def norms(self, tensors: Sequence[Tensor]) -> Tensor:
        """Of each group, G."""
        norm_N = torch.stack(torch._foreach_norm(list(tensors)))
        return (self._member_GN @ norm_N.float().square()).sqrt()

    def remember(self) -> list[Tensor]:
        """The weights as they are, for `apply`."""
        return [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def apply(self, before: list[Tensor], limit: Tensor) -> Moved:
        """Take back what went beyond a limit (scalar)."""
        steps = [parameter - old for parameter, old in zip(self._parameters, before, strict=True)]
        moved_G, weights_G = self.norms(steps), self.norms(before)
        ratio_G = torch.where(weights_G > 0, moved_G / weights_G, 0)
        back_N = (1 - limit / ratio_G).clamp_min(0)[self._group_N]  # the limit is positive, so never 0 / 0
        for parameter, old, back in zip(self._parameters, before, back_N.unbind(), strict=True):
            parameter.lerp_(old, back)
        torch._foreach_mul_(steps, (1 - back_N).unbind())
        return Moved(ratio_G, steps)


def _block_of(name: str, parameter: Tensor) -> int:
    """Its number; -1 for what no block has for itself."""
    is_shared = kind_of(name, tuple(parameter.shape)) is Kind.CODEBOOK
    return -1 if is_shared or not name.startswith("blocks.") else int(name.split(".")[1])
