"""Tokenizers: text to token ids and back. Two kinds behind one interface: bytes, and a `tokenizers` JSON file.

Text is only ever text: a special token spelled out in a document is encoded as the characters it is made of.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import tokenizers
import xxhash
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from pylon_api.training import TokenizerKind, TokenizerSpec
from pylon_trainer.data.sources import read_file
from pylon_trainer.errors import ConfigError

Ids = npt.NDArray[np.int64]

END_OF_TEXT = "<|endoftext|>"
KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<EOS>", "[EOS]", "<|eos|>")
"""What the special token that ends a document is usually called."""


class Tokenizer(Protocol):
    """Text to ids and back."""

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""
        ...

    @property
    def end_of_text(self) -> int:
        """Id that stands between documents."""
        ...

    def encode(self, text: str) -> Ids:
        """Ids of the text, without any special token."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of the ids; special tokens vanish, broken characters become U+FFFD."""
        ...

    def to_json(self) -> str:
        """The same as a `tokenizers` JSON file."""
        ...

    @property
    def end_of_text_token(self) -> str:
        """How the file spells end_of_text."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for tokenizers that give the same ids."""
        ...


def load_tokenizer(spec: TokenizerSpec) -> Tokenizer:
    """The tokenizer that the spec names. Raises ConfigError or DataError in one line."""
    if spec.kind is TokenizerKind.BYTES:
        return ByteTokenizer()
    assert spec.uri is not None  # the spec's own validation
    return FileTokenizer.load(spec.uri, spec.end_of_text)


class ByteTokenizer:
    """The 256 values of a UTF-8 byte, and 256 for the end of a text."""

    vocab_size = 257
    end_of_text = 256
    end_of_text_token = END_OF_TEXT
    fingerprint = "bytes"

    def encode(self, text: str) -> Ids:
        """As Tokenizer has it."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: list[int]) -> str:
        """As Tokenizer has it."""
        return bytes(token for token in ids if token < 256).decode(errors="replace")

    def to_json(self) -> str:
        """A BPE without merges over GPT-2's printable stand-ins for bytes, each with its byte's value as id."""
        backend = tokenizers.Tokenizer(
            models.BPE(vocab={stand_in: byte for byte, stand_in in enumerate(_stand_ins())}, merges=[])
        )
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
        return str(backend.to_str(pretty=True))


class FileTokenizer:
    """A tokenizer as the `tokenizers` library stores it."""

    def __init__(self, backend: tokenizers.Tokenizer, end_of_text_token: str) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self._backend = backend
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_of_text: int = vocabulary[end_of_text_token]
        self.end_of_text_token = end_of_text_token
        self.fingerprint = xxhash.xxh3_64_hexdigest(backend.to_str().encode())

    @classmethod
    def load(cls, uri: str, end_of_text: str | None, field: str = "training.data.tokenizer.uri") -> FileTokenizer:
        """From any fsspec URI. Raises ConfigError when it is no tokenizer or has no end of text."""
        try:
            backend = tokenizers.Tokenizer.from_buffer(read_file(uri, field))
        except Exception as error:  # the Rust library raises plain Exception for a bad file
            if type(error) not in (Exception, ValueError):
                raise
            raise ConfigError(f"{field}: {uri} is no tokenizer.json ({' '.join(str(error).split())})") from error
        vocabulary = backend.get_vocab(with_added_tokens=True)
        special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
        candidates = [end_of_text] if end_of_text else [*KNOWN_ENDS, *(special if len(special) == 1 else [])]
        found = next((token for token in candidates if token in vocabulary), None)
        if found is None:
            raise ConfigError(
                f"training.data.tokenizer.endOfText: {end_of_text or 'not set'}, and {uri} has "
                f"{'no such token' if end_of_text else 'no usual one'}; "
                f"set one of its special tokens ({', '.join(special[:8]) or 'it has none'})"
            )
        return cls(backend, found)

    def encode(self, text: str) -> Ids:
        """As Tokenizer has it."""
        return np.asarray(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def decode(self, ids: list[int]) -> str:
        """As Tokenizer has it."""
        return str(self._backend.decode(ids, skip_special_tokens=True))

    def to_json(self) -> str:
        """As Tokenizer has it."""
        return str(self._backend.to_str(pretty=True))


def _stand_ins() -> list[str]:
    """GPT-2's printable character for each byte: itself where it prints, the next free one from U+0100 where not."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    free = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(free)) for byte in range(256)]
