"""Trunk: what an engine asks of a model, so that it can walk any decoder block by block.

`Transformer` is one as it stands; adapters make others of foreign models. A block may do anything to each token alone,
multiplies by `context.linear`, and lets tokens meet in `context.attend` only (models/context.py).

State-space blocks would fit the same interface. There tokens meet in a scan instead of an attention, so the context
gets a `scan` beside `attend`, with its three forms: the plain one runs it; the keeping one also keeps the states at
the borders of its chunks, which take the part of keys and values; the one of chosen rows runs the scan from those
states, with gradients for the rows' own inputs and without for the others.
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
        """B x T x D to the same. The linear layers that keys_values runs come first, in the same order."""
        ...

    def keys_values(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """What the tokens offer to those that attend to them, each B x J x T x E: what the block hands to `attend`."""
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
