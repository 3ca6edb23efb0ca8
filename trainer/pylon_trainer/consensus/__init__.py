"""How ranks turn their own gradients into one: an explicit step between backward and update."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Exchange(Protocol):
    """One way to sum gradients over ranks. Collective: every rank calls it with the same names and shapes."""

    def exchange(self, named_gradients: Mapping[str, Tensor]) -> None:
        """Replace each gradient, in place, by its sum over all ranks or by what of it has got through.

        Every rank ends with the same bits. Bytes are counted by World.traffic.
        """
        ...

    @property
    def smoothed(self) -> Container[str]:
        """Names of gradients that come with a momentum, so that the optimizer must not add another."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What this rank needs to go on: much of it is its own and no other's. Not copies."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what state_dict gave, or divide_up made of what it gave on all ranks. {} is the start."""
        ...


KEPT = "kept"
"""Key of what a rank has kept of its own gradients to send it later. All else in a state is the same on all ranks."""


def divide_up(states: Sequence[Mapping[str, Any]], ranks: int) -> dict[str, Any]:
    """The state that each of `ranks` ranks goes on with from those of another number of ranks.

    Nothing that was kept is lost: everyone gets an equal share of the sum.
    """
    divided: dict[str, Any] = {}
    for key, first in states[0].items():
        values = [state[key] for state in states]
        if key == KEPT:
            divided[key] = torch.stack(values).sum(0) / ranks
        else:
            divided[key] = divide_up(values, ranks) if isinstance(first, Mapping) else first
    return divided
