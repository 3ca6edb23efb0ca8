"""Sampling: text from a trained model, token by token. For a look at the end of a run, not for serving.

A model without attention goes on from its state, in constant memory and time per token. A model with attention looks
back on a window of tokens and starts anew for each, so it needs no cache and no positions that it was not trained on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pylon_trainer.data.tokenizer import Tokenizer
from pylon_trainer.models import Decoder
from pylon_trainer.models.resonate.cache import Cache

CONTEXT_TOKENS = 256
"""Tokens that attention looks back on at most; each new token costs a pass over them."""


@torch.no_grad()
def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    seed: int,
    *,
    sequence_length: int,
    temperature: float = 0.8,
) -> str:
    """The prompt and up to `tokens` tokens that follow it; fewer if the model ends the text.

    sequence_length: tokens that the model was trained on at a time; positions beyond it mean nothing to it.
    temperature: 0 takes the most probable token each time. The same seed gives the same text.
    """
    read = _window(model, min(CONTEXT_TOKENS, sequence_length)) if model.attends else _state(model)
    draws = torch.Generator().manual_seed(seed)
    ids = [tokenizer.end_of_text, *tokenizer.encode(prompt).tolist()]
    first = len(ids)
    for _ in range(tokens):
        # Rows of the vocabulary that the tokenizer does not know are never drawn.
        logits_V = model.head(read(ids)).float().cpu()[: tokenizer.vocab_size]
        if temperature == 0:
            token = int(logits_V.argmax())
        else:
            token = int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=draws))
        if token == tokenizer.end_of_text:
            break
        ids.append(token)
    return prompt + tokenizer.decode(ids[first:])


Reader = Callable[[list[int]], Tensor]
"""The hidden state D after the last of all tokens so far."""


def _window(model: Decoder, tokens: int) -> Reader:
    device = model.embedding.weight.device

    def read(ids: list[int]) -> Tensor:
        hidden_1TD: Tensor = model(torch.tensor([ids[-tokens:]], device=device))
        return hidden_1TD[0, -1]

    return read


def _state(model: Decoder) -> Reader:
    device = model.embedding.weight.device
    cache, known = Cache(model), 0

    def read(ids: list[int]) -> Tensor:
        nonlocal known
        hidden_1TD = cache.extend(torch.tensor([ids[known:]], device=device))
        known = len(ids)
        return hidden_1TD[0, -1]

    return read
