"""Sampling: text from a trained model, token by token. For a look at the end of a run, not for serving: no cache."""

from __future__ import annotations

import torch

from pylon_trainer.data.tokenizer import Tokenizer
from pylon_trainer.models import Transformer

CONTEXT_TOKENS = 256
"""Tokens that are looked back on at most; each new token costs a pass over them."""


@torch.no_grad()
def generate(
    model: Transformer,
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
    context = min(CONTEXT_TOKENS, sequence_length)
    device = next(model.parameters()).device
    draws = torch.Generator().manual_seed(seed)
    ids = [tokenizer.end_of_text, *tokenizer.encode(prompt).tolist()]
    first = len(ids)
    for _ in range(tokens):
        hidden_1TD = model(torch.tensor([ids[-context:]], device=device))
        # Rows of the vocabulary that the tokenizer does not know are never drawn.
        logits_V = model.head(hidden_1TD[0, -1]).float().cpu()[: tokenizer.vocab_size]
        if temperature == 0:
            token = int(logits_V.argmax())
        else:
            token = int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=draws))
        if token == tokenizer.end_of_text:
            break
        ids.append(token)
    return prompt + tokenizer.decode(ids[first:])
