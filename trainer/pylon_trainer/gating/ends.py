"""Ends: the embedding and the last norm of a trunk, which every engine passes alike, and the form of the way back.

Both work on each token alone and cost little, so the way back runs them again on the rows that it is about.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from pylon_trainer.gating.depth import Depth
from pylon_trainer.gating.gradients import Sink, go_back
from pylon_trainer.gating.trunk import Trunk

Autocast = Callable[[], AbstractContextManager[object]]


class Back(Protocol):
    """The way back of a forward pass, to be gone once."""

    def __call__(self, rows_K: Tensor, gradient_KD: Tensor, sink: Sink, depth: Depth | None = None) -> None:
        """Hand what the parameters below the head receive to the sink.

        rows_K: distinct and rising; gradient_KD: the gradient at them. depth: how far down each row's goes; None: to
        the bottom.
        """
        ...


class Ends:
    """The two ends of one trunk."""

    def __init__(self, trunk: Trunk, autocast: Autocast) -> None:
        self._trunk = trunk
        self._autocast = autocast
        within = {id(parameter) for block in trunk.blocks for parameter in block.parameters()}
        self._parameters = [parameter for parameter in trunk.parameters() if id(parameter) not in within]

    def back_over_norm(self, top: Tensor, gradient: Tensor, sink: Sink) -> Tensor:
        """The gradient at rows of what left the last block, from the one at them after the norm."""
        leaf = top.detach().requires_grad_()
        with torch.enable_grad(), self._autocast():
            normed = self._trunk.norm(leaf)
        (at_top,) = go_back(normed, gradient, self._parameters, sink, leaf)
        return at_top

    def back_over_embedding(self, tokens: Tensor, places: Tensor, gradient: Tensor, sink: Sink) -> None:
        """Gradient: at what enters the first block."""
        with torch.enable_grad(), self._autocast():
            entering = self._trunk.embed(tokens, places)
        if entering.requires_grad:  # not when the embedding is frozen
            go_back(entering, gradient, self._parameters, sink)


def precision_of(device: torch.device) -> torch.dtype | None:
    """Of products under the autocast that is in force; None: the weights' own."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
