"""How ranks turn their own gradients into one: an explicit step between backward and update."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any, Protocol

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

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from what all ranks of a run gave, in the order of ranks.

        On another number of ranks nothing that was kept is lost: each gets an equal share of the sum.
        """
        ...
