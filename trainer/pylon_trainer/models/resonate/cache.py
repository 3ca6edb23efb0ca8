"""Cache: what a decoder remembers of the tokens so far, so that a new token costs one pass over that token alone.

A mixer remembers a state of fixed size, so a model without attention generates in constant memory and time per token.
Attention remembers keys and values of every token. It is for inference: no gradients, no documents, one text per
sequence.

Shapes: B sequences, T new tokens, S tokens in all, H query heads, J key and value heads, E width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from pylon_trainer.models.context import Context, Memory, Mixer
from pylon_trainer.models.decoder import Decoder


class Cache:
    """The memory of one decoder over B texts."""

    def __init__(self, model: Decoder) -> None:
        self._model = model
        self._memories: list[list[Memory]] = [[] for _ in model.blocks]
        self._tokens = 0

    @torch.no_grad()
    def extend(self, tokens_BT: Tensor) -> Tensor:
        """Hidden states B x T x D after the last norm of the tokens that come next; any T, also 1."""
        model = self._model
        context = model.context(tokens_BT, first=self._tokens)
        x_BTD = model.embed(tokens_BT, context.places)
        for number, block in enumerate(model.blocks):
            remembering = RememberingContext(**vars(context), memories=self._memories[number])
            x_BTD = block(x_BTD, remembering)
            self._memories[number] = remembering.left
        self._tokens += tokens_BT.shape[1]
        normed_BTD: Tensor = model.norm(x_BTD)
        return normed_BTD

    def bytes(self) -> int:
        """Of what is remembered."""
        return sum(x.nbytes for memories in self._memories for memory in memories for x in memory)


@dataclass(frozen=True)
class RememberingContext(Context):
    """The context of one block's new tokens, which see those that the block remembers."""

    memories: list[Memory]
    """What each place of the block where tokens meet left the last time, in the order of their calls; none the first
    time."""
    left: list[Memory] = field(default_factory=list)
    """What they leave this time."""

    def attend(self, q_BHTE: Tensor, k_BJTE: Tensor, v_BJTE: Tensor) -> Tensor:
        """As Context has it. Memory: keys and values, B x J x S x E each."""
        memory = self._memory
        if memory is not None:
            k_BJTE, v_BJTE = (torch.cat(pair, 2) for pair in zip(memory, (k_BJTE, v_BJTE), strict=True))
        self.left.append((k_BJTE, v_BJTE))
        new, all_ = q_BHTE.shape[2], k_BJTE.shape[2]
        sees_TS = torch.ones(new, all_, dtype=torch.bool, device=q_BHTE.device).tril(all_ - new)
        is_grouped = q_BHTE.shape[1] != k_BJTE.shape[1]
        return F.scaled_dot_product_attention(q_BHTE, k_BJTE, v_BJTE, attn_mask=sees_TS, enable_gqa=is_grouped)

    def mix(self, mixer: Mixer, x_BTI: Tensor) -> Tensor:
        """As Context has it."""
        with torch.autocast(x_BTI.device.type, enabled=False):  # a mixer chooses its own precisions
            y_BTO, memory = mixer.run(x_BTI, None, self._memory, self.advice_PR)
        self.left.append(memory)
        return y_BTO

    @property
    def _memory(self) -> Memory | None:
        """Of the place that asks now."""
        return self.memories[len(self.left)] if self.memories else None
