"""A rank's share of a state: which tensors it writes, and how they lie in its file.

Tensors that all ranks have alike are divided over them by size; what a rank has for itself it writes itself, and that
always holds a tensor (the state of its generators), so every rank has a file. Every rank comes to the same division
without a word, and computes it again only when a tensor has come, gone or changed its shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pylon_trainer.checkpoint.layout import Layout, assign, tensor_bytes
from pylon_trainer.checkpoint.state import Tree, describe, place, separate

OWN = "own"
"""Before the keys of what a rank has for itself."""


def file_of(rank: int) -> str:
    """The name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank writes of one state."""

    file: str
    layout: Layout
    tensors: dict[str, Tensor]
    replicated: Tree
    """Values, with the file of every tensor."""
    own: Tree


class Divider:
    """Divides one state after the other for a rank."""

    def __init__(self, rank: int, ranks: int) -> None:
        self._rank = rank
        self._ranks = ranks
        self._described: Any = None
        self._owners: dict[str, int] = {}
        self._layout: Layout | None = None

    def share(self, replicated: Mapping[str, Any], own: Mapping[str, Any]) -> Share:
        """This rank's part; nothing is copied. TypeError or ValueError, naming it, for what cannot be saved."""
        values, tensors = separate(replicated)
        own_values, own_tensors = separate(own, OWN)
        described = describe(tensors), describe(own_tensors)
        if self._layout is None or described != self._described:
            self._owners = assign({key: tensor_bytes(*what) for key, what in described[0].items()}, self._ranks)
            mine = {key: what for key, what in described[0].items() if self._owners[key] == self._rank}
            self._layout, self._described = Layout.of({**mine, **described[1]}), described
        return Share(
            file=file_of(self._rank),
            layout=self._layout,
            tensors={key: tensor for key, tensor in tensors.items() if self._owners[key] == self._rank} | own_tensors,
            replicated=place(values, lambda key: file_of(self._owners[key])),
            own=place(own_values, lambda _: file_of(self._rank)),
        )
