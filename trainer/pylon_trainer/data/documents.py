"""Documents: files are cut into pieces that can be read alone, and a piece is read as a stream of documents.

Cutting needs no look at the text (a piece owns the lines that begin inside it), so a corpus of any size opens at once
and one large file can feed many readers. Nothing unreadable is skipped: it is an error that names file and place.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import pyarrow
import pyarrow.parquet

from pylon_api.training import DataFormat
from pylon_trainer.data.sources import File
from pylon_trainer.errors import DataError

SMALLEST_PIECE_BYTES = 2**15
LARGEST_PIECE_BYTES = 2**20
PIECES_PER_FILE = 64
"""A file is cut into this many pieces, as far as the bounds on their size allow."""
PARQUET_ROWS = 256
"""Rows of Parquet that are decoded together."""
FOOTER_READERS = 16
"""Parquet footers that are read at the same time."""


@dataclass(frozen=True, slots=True)
class Document:
    """Text of a document, or of a part of one that was too long for a piece."""

    text: str
    begins: bool = True
    ends: bool = True


@dataclass(frozen=True, slots=True)
class Piece:
    """What is read in one go: the lines that begin in bytes start..end of text and JSONL, row group `start` of Parquet,
    the whole of a compressed file."""

    file: File
    format: DataFormat
    start: int
    end: int

    @property
    def place(self) -> str:
        """Stable name of the piece."""
        return f"{self.file.uri}#{self.start}"

    def documents(self, text_field: str) -> Iterator[Document]:
        """Its documents in order. Raises DataError with file and place for what cannot be read."""
        readers = {DataFormat.TEXT: _read_text, DataFormat.JSONL: _read_jsonl, DataFormat.PARQUET: _read_parquet}
        return readers[self.format](self, text_field)


def cut(files: Sequence[File], wanted: DataFormat) -> list[Piece]:
    """All pieces of the files, in order."""
    with ThreadPoolExecutor(FOOTER_READERS) as readers:
        return [piece for pieces in readers.map(lambda file: _cut(file, wanted), files) for piece in pieces]


def _cut(file: File, wanted: DataFormat) -> list[Piece]:
    found = _format(file) if wanted is DataFormat.AUTO else wanted
    if found is DataFormat.PARQUET:
        with _parquet(file) as table:
            return [Piece(file, found, group, group + 1) for group in range(table.num_row_groups)]
    if file.compressed:
        return [Piece(file, found, 0, file.size)]
    size = min(max(file.size // PIECES_PER_FILE, SMALLEST_PIECE_BYTES), LARGEST_PIECE_BYTES)
    return [Piece(file, found, start, min(start + size, file.size)) for start in range(0, file.size, size)]


def _format(file: File) -> DataFormat:
    name = file.path.removesuffix(".gz")
    if name.endswith((".jsonl", ".ndjson")):
        return DataFormat.JSONL
    return DataFormat.PARQUET if name.endswith(".parquet") else DataFormat.TEXT


def _read_text(piece: Piece, text_field: str) -> Iterator[Document]:  # noqa: ARG001  all readers are called alike
    file = piece.file
    if file.compressed:
        with file.open() as stream:
            start, data = 0, b"".join(_decompressed(stream, file))
    else:
        start, data = _lines(piece)
    ends = file.compressed or start + len(data) >= file.size
    if data:
        yield Document(_decode(data, file, start), begins=start == 0, ends=ends)


def _read_jsonl(piece: Piece, text_field: str) -> Iterator[Document]:
    file = piece.file
    if file.compressed:
        with file.open() as stream:
            yield from _parse(_decompressed(stream, file), file, 0, text_field)
    else:
        start, data = _lines(piece)
        yield from _parse(data.splitlines(keepends=True), file, start, text_field)


def _parse(lines: Iterator[bytes] | list[bytes], file: File, start: int, text_field: str) -> Iterator[Document]:
    """Documents of JSON lines, the first of which begins at byte `start`."""
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:  # both JSON's and Unicode's errors are one
            raise DataError(f"{_line(file, start, index)}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise DataError(f"{_line(file, start, index)}: holds no JSON object, but {str(record)[:40]!r}")
        if not isinstance(record.get(text_field), str):
            present = ", ".join(sorted(record)) or "no field"
            raise DataError(
                f"{_line(file, start, index)}: no text in field {text_field!r}, there is {present}; "
                "set training.data.textField"
            )
        yield Document(record[text_field])


def _read_parquet(piece: Piece, text_field: str) -> Iterator[Document]:
    with _parquet(piece.file) as table:
        if text_field not in table.schema_arrow.names:
            present = ", ".join(table.schema_arrow.names)
            raise DataError(
                f"{piece.file.uri}: no column {text_field!r}, there is {present}; set training.data.textField"
            )
        kind = table.schema_arrow.field(text_field).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise DataError(f"{piece.file.uri}: column {text_field!r} holds {kind}, not text")
        rows = table.iter_batches(PARQUET_ROWS, row_groups=[piece.start], columns=[text_field])
        for batch in rows:
            for text in batch.column(0).to_pylist():
                if text:
                    yield Document(text)


@contextmanager
def _parquet(file: File) -> Iterator[pyarrow.parquet.ParquetFile]:
    with file.open() as stream:
        try:
            yield pyarrow.parquet.ParquetFile(stream)
        except (pyarrow.ArrowInvalid, OSError) as error:
            if getattr(error, "errno", None) is not None:  # the store's own error, not Parquet's
                raise
            raise DataError(f"{file.uri}: not a whole Parquet file ({' '.join(str(error).split())})") from error


def _lines(piece: Piece) -> tuple[int, bytes]:
    """The lines that begin inside the piece, and the byte at which the first does."""
    file = piece.file
    if piece.start == 0:
        start, data = 0, file.read(0, piece.end)
    else:
        # One byte earlier, so that a line which begins exactly at the border is seen to begin there.
        head, newline, data = file.read(piece.start - 1, piece.end).partition(b"\n")
        start = piece.start + len(head)
        if not newline or not data:
            return piece.end, b""
    reached = piece.end
    while not data.endswith(b"\n") and reached < file.size:
        more = file.read(reached, min(reached + SMALLEST_PIECE_BYTES, file.size))
        head, newline, _ = more.partition(b"\n")
        data += head + newline
        reached += len(more)
    return start, data


def _decompressed(stream: IO[bytes], file: File) -> Iterator[bytes]:
    try:
        yield from stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{file.uri}: not a whole gzip file ({error})") from error


def _decode(data: bytes, file: File, start: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file.uri}: not UTF-8 at byte {start + error.start}; convert the file or leave it out of the globs"
        ) from error


def _line(file: File, start: int, index: int) -> str:
    """`file, line n` of the line `index` lines after byte `start`."""
    before = file.read(0, start).count(b"\n") if start else 0
    return f"{file.uri}, line {before + index + 1}"
