"""Lookahead: slow weights that the optimizer's meet every few updates (Zhang et al. 2019, arXiv 1907.08610).

Whether this is such an update is decided on the device, where updates are counted without those that were left out.
Between two meetings evaluation, checkpoints and exports see the optimizer's weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pylon_api.training import LookaheadSpec
from pylon_trainer.optim.rule import blend


class Lookahead:
    """The slow weights, which start where the optimizer's do."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], spec: LookaheadSpec) -> None:
        self._parameters = parameters
        self._spec = spec
        self.state = {"slow_weights": {name: p.detach().clone() for name, p in parameters.items()}}

    @torch.no_grad()
    def begin(self) -> None:
        """Slow weights start here, where the optimizer's are by now."""
        for name, slow in self.state["slow_weights"].items():
            slow.copy_(self._parameters[name])

    def follow(self, updates: Tensor, is_bad: Tensor) -> None:
        """After an update of the optimizer's; arguments as Step has them."""
        is_skipped = torch.maximum((updates % self._spec.steps != 0).float(), is_bad)
        fast: list[Tensor] = list(self._parameters.values())
        slow = list(self.state["slow_weights"].values())
        blend(slow, fast, self._spec.ratio, is_skipped)
        blend(fast, slow, 1.0, is_skipped)
