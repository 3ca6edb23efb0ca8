"""How ranks make one model of what each of them learns: an explicit step between backward and update, which exchanges
gradients, or one after the update, which exchanges weights."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Exchange(Protocol):
    """One way to agree. Collective: every rank calls it with the same names and shapes. World.traffic counts bytes."""

    def exchange(self, named_gradients: Mapping[str, Tensor]) -> None:
        """Make of each gradient, in place, what this rank's update takes.

        That is its sum over all ranks, or what of it has got through, with the same bits on every rank; with local
        steps, this rank's own estimate of the sum. Where one rank's are not finite, no rank's are.
        """
        ...

    def after_update(self, *, is_last: bool) -> None:
        """Let ranks agree on weights, where it is not gradients that they exchange. To be called after each update.

        is_last: whether training ends here. All ranks then have the same weights, bit for bit.
        """
        ...

    @property
    def replicas(self) -> Mapping[str, Tensor]:
        """What all ranks have alike where each has weights and optimizer state of its own: the shared weights by the
        names of the parameters, and more. Empty where weights and optimizer state are alike. Not copies."""
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
