"""Tensors that go to the other ranks together: those of one kind, as one flat vector.

Kinds differ in what their gradients look like, so each gets a codec of its own. A tensor's kind is told by its name and
shape: models call their token embedding `embedding`, their head `output` or `head`, and a codebook `...codebook...`.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


class Kind(enum.StrEnum):
    """What a tensor is to its model."""

    EMBEDDING = "embedding"
    HEAD = "head"
    CODEBOOK = "codebook"
    MATRICES = "matrices"
    VECTORS = "vectors"


_BY_MODULE = {"embedding": Kind.EMBEDDING, "output": Kind.HEAD, "head": Kind.HEAD}


@dataclass(frozen=True)
class Group:
    """The tensors of one kind, in the order of the model."""

    kind: Kind
    shapes: Mapping[str, tuple[int, ...]]
    """By name."""

    @property
    def values(self) -> int:
        """Numbers in all its tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def row_width(self) -> int | None:
        """Values of a row, when all its tensors are matrices of rows as long; else None."""
        widths = {shape[-1] if len(shape) == 2 else None for shape in self.shapes.values()}
        return widths.pop() if len(widths) == 1 else None

    def flatten(self, named: Mapping[str, Tensor]) -> Tensor:
        """Its tensors as one float32 vector, a copy."""
        return torch.cat([named[name].flatten().float() for name in self.shapes])

    def write(self, flat_N: Tensor, named: Mapping[str, Tensor]) -> None:
        """The reverse, into the tensors and in their precision."""
        parts = flat_N.split([math.prod(shape) for shape in self.shapes.values()])
        tensors = [named[name] for name in self.shapes]
        torch._foreach_copy_(tensors, [part.view_as(t) for part, t in zip(parts, tensors, strict=True)])


def group_by_kind(shapes: Mapping[str, tuple[int, ...]]) -> list[Group]:
    """Groups of these tensors, in the order of Kind; tensors without values, and kinds without tensors, are in none."""
    filled = {name: shape for name, shape in shapes.items() if math.prod(shape)}
    kinds = {name: kind_of(name, shape) for name, shape in filled.items()}
    return [
        Group(kind, {name: shape for name, shape in filled.items() if kinds[name] is kind})
        for kind in Kind
        if kind in kinds.values()
    ]


def kind_of(name: str, shape: tuple[int, ...]) -> Kind:
    """Told by name and shape."""
    if "codebook" in name and len(shape) > 1:
        return Kind.CODEBOOK
    if len(shape) <= 1:
        return Kind.VECTORS
    return _BY_MODULE.get(name.partition(".")[0], Kind.MATRICES)
