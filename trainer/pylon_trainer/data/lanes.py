"""Lanes: the corpus as endless streams of tokens, one for each sequence of the global batch.

A lane reads its own share of the corpus and remembers where it is as three numbers. Ranks merely divide the lanes among
them, so the samples of a step do not depend on how many ranks there are, and any number of ranks can resume.

Shapes: T tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from pylon_api.training import DataFormat
from pylon_trainer.data.documents import Document, Piece
from pylon_trainer.data.tokenizer import Ids, Tokenizer
from pylon_trainer.errors import DataError

SHUFFLE_WINDOW = 256
"""Documents of one piece that are shuffled together."""

GOLDEN = 0.6180339887498949
"""Multiples of it, modulo 1, fill the unit interval evenly however many are taken."""

Holds = Callable[[str], bool]


class Corpus:
    """Pieces in an endless order: all of them, then all of them again, shuffled anew each time if there is a seed."""

    def __init__(self, pieces: Sequence[Piece], text_field: str, keep: Holds, seed: int | None) -> None:
        """keep: whether the document of a place belongs to this corpus."""
        self._pieces = [piece for piece in pieces if not _is_one_document(piece) or keep(_place(piece, 0))]
        self._text_field = text_field
        self._keep = keep
        self._seed = seed
        self._orders: dict[int, npt.NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return len(self._pieces)

    def documents(self, position: int) -> Iterator[Document]:
        """The documents of the piece at a position, from 0 and without end."""
        epoch, place = divmod(position, len(self))
        piece = self._pieces[place if self._seed is None else self._order(epoch, self._seed)[place]]
        kept = (
            document
            for number, document in enumerate(piece.documents(self._text_field))
            if self._keep(_place(piece, number))
        )
        if self._seed is None:
            yield from kept
            return
        draws = np.random.default_rng([self._seed, position])
        while window := list(islice(kept, SHUFFLE_WINDOW)):
            yield from (window[index] for index in draws.permutation(len(window)))

    def _order(self, epoch: int, seed: int) -> npt.NDArray[np.int64]:
        if epoch not in self._orders:
            if len(self._orders) > 2:  # lanes are never far apart
                self._orders.pop(min(self._orders))
            self._orders[epoch] = np.random.default_rng([seed, epoch]).permutation(len(self))
        return self._orders[epoch]


def hold_out(pieces: Sequence[Piece], fraction: float) -> Holds:
    """Which places are held out: those whose hash is among the lowest `fraction` of all hashes.

    A corpus of few text files holds out the one of the lowest hash, rather than none.
    """
    limit = fraction * 2**64
    if fraction and len(pieces) > 1 and all(map(_is_one_document, pieces)):
        limit = max(limit, 1 + min(_hash(_place(piece, 0)) for piece in pieces))
    return lambda place: _hash(place) < limit


class NoText(DataError):
    """No document of the whole corpus holds any text."""


class Position(NamedTuple):
    """Where a lane reads next."""

    piece: int
    """Position in the corpus."""
    document: int
    """Document in the piece, as the corpus gives them."""
    token: int
    """Token in the document; -1 for a lane that has not begun, which may begin in the middle of one."""


class Sample(NamedTuple):
    """One sequence: T tokens, the T tokens that follow them, and the number of each one's document."""

    tokens_T: Ids
    labels_T: Ids
    documents_T: npt.NDArray[np.int32]


class Lane:
    """One stream: every `lanes`-th piece of the corpus, from the one of its own number on.

    A document becomes the end-of-text token, its text, and the end-of-text token, so that beginning and ending are both
    learned and no label reaches into the next document.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        lanes: int,
        number: int,
        position: Position | None = None,
        begin: float | None = None,
    ) -> None:
        """position: where to go on. begin: share of the first document to pass over; unset, lanes begin at the start of
        their pieces as long as there are pieces enough, and spread over them where there are not."""
        self.position = position or Position(number, 0, -1)
        self._corpus = corpus
        self._tokenizer = tokenizer
        self._lanes = lanes
        self._begin = begin if begin is not None else number // len(corpus) * GOLDEN % 1
        self._documents: Iterator[Document] | None = None
        self._ids: Ids | None = None

    def next_sample(self, length: int) -> Sample:
        """The next `length` tokens. Raises NoText when nothing of the corpus holds any."""
        sample = Sample(np.empty(length, np.int64), np.empty(length, np.int64), np.empty(length, np.int32))
        filled = number = 0
        while filled < length:
            ids = self._current()
            start = self.position.token
            taken = min(length - filled, len(ids) - 1 - start)
            here = slice(filled, filled + taken)
            sample.tokens_T[here] = ids[start : start + taken]
            sample.labels_T[here] = ids[start + 1 : start + taken + 1]
            sample.documents_T[here] = number
            filled += taken
            number += 1
            if start + taken == len(ids) - 1:
                self.position = Position(self.position.piece, self.position.document + 1, 0)
                self._ids = None
            else:
                self.position = self.position._replace(token=start + taken)
        return sample

    def _current(self) -> Ids:
        """Ids of the document at the position, at least two; moves on over what is empty."""
        if self._ids is not None:
            return self._ids
        first_piece = self.position.piece
        while (self.position.piece - first_piece) // self._lanes < 16 * (len(self._corpus) + 1):
            if self._documents is None:
                self._documents = islice(self._corpus.documents(self.position.piece), self.position.document, None)
            for document in self._documents:
                ids = self._encode(document)
                if len(ids) > 1:
                    self._ids = ids
                    if self.position.token < 0:
                        self.position = self.position._replace(token=int(self._begin * (len(ids) - 1)))
                    return ids
                self.position = self.position._replace(document=self.position.document + 1)
            self.position = Position(self.position.piece + self._lanes, 0, min(self.position.token, 0))
            self._documents = None
        raise NoText(f"training.data: {len(self._corpus)} pieces of files were read and none holds any text")

    def _encode(self, document: Document) -> Ids:
        end = np.array([self._tokenizer.end_of_text])
        ids = self._tokenizer.encode(document.text)
        if not len(ids):
            return ids
        return np.concatenate(([end] if document.begins else []) + [ids] + ([end] if document.ends else []))


def _is_one_document(piece: Piece) -> bool:
    return piece.format is DataFormat.TEXT


def _place(piece: Piece, number: int) -> str:
    return f"{piece.place}/{number}"


def _hash(place: str) -> int:
    return xxhash.xxh64_intdigest(place.encode())
