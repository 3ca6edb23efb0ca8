"""Cache: what a decoder remembers of the tokens so far, so that a new token costs one pass over that token alone.

A mixer remembers a state of fixed size, so a model without attention generates in constant memory and time per token.
Attention remembers keys and values of every token. It is for inference: no gradients, no documents, one text per
sequence.

Shapes: B sequences, T new tokens, S tokens in all, H query heads, J key and value heads, E width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pylon_trainer.models.context import Context, Memory, Mixer
from pylon_trainer.models.decoder import Decoder


class Cache:
    """The memory of one decoder over B texts."""

    def __init__(self, model: Decoder) -> None:
        self._model = model
        self._memories: list[Memory | None] = [None for _ in model.blocks]
        self._tokens = 0

    @torch.no_grad()
    def extend(self, tokens_BT: Tensor) -> Tensor:
        """Hidden states B x T x D after the last norm of the tokens that come next; any T, also 1."""
        model = self._model
        context = model.context(tokens_BT, first=self._tokens)
        x_BTD = model.embed(tokens_BT, context.places)
        for number, block in enumerate(model.blocks):
            remembering = RememberingContext(**vars(context), memory=self._memories[number])
            x_BTD = block(x_BTD, remembering)
            self._memories[number] = remembering.left[0]
        self._tokens += tokens_BT.shape[1]
        normed_BTD: Tensor = model.norm(x_BTD)
        return normed_BTD

    def bytes(self) -> int:
        """Of what is remembered."""
        return sum(x.numel() * x.element_size() for memory in self._memories if memory is not None for x in memory)
