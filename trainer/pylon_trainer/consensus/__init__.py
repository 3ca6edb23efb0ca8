"""How ranks turn their own gradients into one: an explicit step between backward and update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class Exchange(Protocol):
    """One way to sum gradients over ranks. Collective: every rank calls it with the same names and shapes."""

    def exchange(self, named_gradients: Mapping[str, Tensor]) -> int:
        """Replace each gradient by its sum over all ranks, in place.

        Returns the bytes that this rank exchanged, the larger of sent and received.
        """
        ...
