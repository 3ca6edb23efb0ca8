"""Trunk: what an engine asks of a model, so that it can walk any decoder block by block.

A `Decoder` is one as it stands; adapters make others of foreign models. A block may do anything to each token alone,
multiplies by `context.linear`, and lets tokens meet in `context.attend` and `context.mix` only (models/context.py).

What tokens offer to later ones is keys and values where a block attends, and the input of its mixer where a state is
handed along. The keeping context keeps it; the context of chosen rows puts the rows' own, with gradients, in the place
of theirs, and leaves the others' without. Rows attend as queries; a mixer runs over the whole sequence again, which is
a small part of its block, and only the layers before and after it run on the rows alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor
from torch.nn import Parameter

from pylon_trainer.models.context import Context


class Block(Protocol):
    """One layer of the residual stream."""

    def __call__(self, x_BTD: Tensor, context: Context) -> Tensor:
        """B x T x D to the same. The linear layers that offers runs come first, in the same order."""
        ...

    def offers(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, ...]:
        """What the tokens offer to later ones: keys and values, each B x J x T x E, that the block hands to `attend`,
        or the one B x T x I that it hands to `mix`."""
        ...

    def parameters(self) -> Iterator[Parameter]:
        """Its parameters."""
        ...


class Trunk(Protocol):
    """A decoder below its head."""

    @property
    def blocks(self) -> Sequence[Block]:
        """From the first to the last."""
        ...

    def context(self, tokens_BT: Tensor, documents_BT: Tensor | None) -> Context:
        """What every block needs to know of these sequences."""
        ...

    def embed(self, tokens: Tensor, places: Tensor) -> Tensor:
        """What enters the first block, ... x D, of tokens of any shape at those places of their documents."""
        ...

    def norm(self, x: Tensor) -> Tensor:
        """What leaves the last block, ... x D, as the head reads it."""
        ...

    def parameters(self) -> Iterator[Parameter]:
        """All of them, the blocks' included."""
        ...
