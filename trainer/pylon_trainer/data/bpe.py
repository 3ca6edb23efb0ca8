"""Training a byte-level BPE tokenizer on a corpus, as a stream: the text is never held as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from pylon_trainer.data.documents import Piece
from pylon_trainer.data.tokenizer import END_OF_TEXT
from pylon_trainer.errors import ConfigError

SMALLEST_VOCABULARY = 257
"""Every byte and the end of a text, so that any text can be encoded."""


def train_bpe(texts: Iterator[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A tokenizer of at most `vocab_size` tokens, all bytes among them, with END_OF_TEXT as its only special token.

    Raises ConfigError for a vocabulary too small for the bytes.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(f"--vocab-size: {vocab_size} is too small, at least {SMALLEST_VOCABULARY} are needed")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def texts_of(pieces: Iterable[Piece], text_field: str) -> Iterator[str]:
    """The text of every document of the pieces, in order."""
    for piece in pieces:
        yield from (document.text for document in piece.documents(text_field))
