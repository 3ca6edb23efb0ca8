"""Where each tensor lies in a checkpoint's file, decided before a byte is copied.

The file is a safetensors file: eight bytes with the header's length, a JSON header, then the tensors without a gap
(https://huggingface.co/docs/safetensors#format). Knowing only names, dtypes and shapes, every rank comes to the same
layout, and a slab of memory can be filled so that it *is* the file. Pure: needs no torch, moves no data.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

HEADER = ""
"""Stands for the header where pieces of the file are named; no tensor has this name."""

_LENGTH_BYTES = 8
_ALIGNMENT_BYTES = 64
"""The body begins on a cache line; wider types come first, so every tensor is aligned to its own type."""

_METADATA_KEY = "__metadata__"
_METADATA = {"format": "pt"}  # transformers refuses files that do not say which framework wrote them
_TYPES = {
    "complex64": ("C64", 8),
    "float64": ("F64", 8),
    "int64": ("I64", 8),
    "uint64": ("U64", 8),
    "float32": ("F32", 4),
    "int32": ("I32", 4),
    "uint32": ("U32", 4),
    "bfloat16": ("BF16", 2),
    "float16": ("F16", 2),
    "int16": ("I16", 2),
    "uint16": ("U16", 2),
    "bool": ("BOOL", 1),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e4m3fnuz": ("F8_E4M3FNUZ", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "float8_e5m2fnuz": ("F8_E5M2FNUZ", 1),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
}
"""torch's name of a dtype: safetensors' name and bytes of an element. Only what safetensors.torch.load knows."""
_DTYPES = {name: dtype for dtype, (name, _) in _TYPES.items()}


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; dtype by torch's name, "float32". ValueError when safetensors has no such type."""
    if dtype not in _TYPES:
        raise ValueError(f"dtype {dtype} cannot be saved: safetensors has {', '.join(sorted(_TYPES))}")
    return math.prod(shape) * _TYPES[dtype][1]


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor in the file."""

    dtype: str
    """By torch's name, such as "float32"."""
    shape: tuple[int, ...]
    offset: int
    """Its first byte, from the beginning of the file."""
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of bytes that one tensor, or the header, has in a part of the file."""

    name: str
    begin: int
    """Its first byte, from the beginning of the tensor."""
    offset: int
    """Its first byte, from the beginning of the file."""
    length: int


@dataclass(frozen=True, slots=True)
class Part:
    """A range of the file that is copied and written as one."""

    offset: int
    length: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """The offset table of one file."""

    header: bytes
    """Everything before the first tensor."""
    places: dict[str, Place]
    """By name, in the order of the file."""
    size_bytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Layout:
        """The file that holds these tensors, each by its dtype's torch name and its shape.

        The same for the same tensors, in whatever order they come. ValueError for a dtype that cannot be saved.
        """
        sizes: dict[str, int] = {}
        for name, (dtype, shape) in tensors.items():
            if name in (HEADER, _METADATA_KEY):
                raise ValueError(f"{name!r} cannot be the name of a tensor")
            try:
                sizes[name] = tensor_bytes(dtype, shape)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        ordered = sorted(tensors, key=lambda name: (-_TYPES[tensors[name][0]][1], name))
        header: dict[str, Any] = {_METADATA_KEY: _METADATA}
        begin = 0
        for name in ordered:
            dtype, shape = tensors[name]
            end = begin + sizes[name]
            header[name] = {"dtype": _TYPES[dtype][0], "shape": list(shape), "data_offsets": [begin, end]}
            begin = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(_LENGTH_BYTES + len(text)) % _ALIGNMENT_BYTES)
        return cls.parse(len(text).to_bytes(_LENGTH_BYTES, "little") + text)

    @classmethod
    def parse(cls, data: bytes | bytearray | memoryview) -> Layout:
        """The layout of a file that begins with this data. ValueError when its header is cut off or damaged."""
        try:
            end = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
            if len(data) < end:
                raise ValueError(f"{len(data)} bytes instead of {end}")
            header = json.loads(bytes(data[_LENGTH_BYTES:end]))
            header.pop(_METADATA_KEY, None)
            found = {name: _place(field, end) for name, field in header.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no safetensors header: {error!r}") from error
        places = dict(sorted(found.items(), key=lambda item: (item[1].offset, item[1].size_bytes)))
        offset = end
        for name, place in places.items():
            if place.offset != offset:
                raise ValueError(f"no safetensors header: {name} begins at {place.offset} instead of {offset}")
            offset += place.size_bytes
        return cls(bytes(data[:end]), places, offset)

    def parts(self, part_bytes: int) -> Iterator[Part]:
        """The whole file in parts of this size (the last may be shorter), with what each is made of."""
        spans = [Piece(HEADER, 0, 0, len(self.header))]
        spans += [Piece(name, 0, place.offset, place.size_bytes) for name, place in self.places.items()]
        first = 0
        for offset in range(0, self.size_bytes, part_bytes):
            end = min(offset + part_bytes, self.size_bytes)
            while spans[first].offset + spans[first].length <= offset:
                first += 1
            pieces = []
            for span in spans[first:]:
                if span.offset >= end:
                    break
                start, stop = max(offset, span.offset), min(end, span.offset + span.length)
                if stop > start:
                    pieces.append(Piece(span.name, start - span.offset, start, stop - start))
            yield Part(offset, end - offset, tuple(pieces))


def assign(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Which rank saves which tensor: the largest first, each to the rank that has least so far, then to the lowest.

    The same on every rank, and at most a third above the best possible division or one tensor (Graham 1969, Bounds on
    multiprocessing timing anomalies). With fewer tensors than ranks some ranks save nothing.
    """
    loads = [(0, rank) for rank in range(ranks)]
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, owners[name] = loads[0]
        heapq.heapreplace(loads, (load + sizes[name], owners[name]))
    return owners


def _place(field: dict[str, Any], body_begin: int) -> Place:
    dtype, shape, (begin, end) = _DTYPES[field["dtype"]], tuple(field["shape"]), field["data_offsets"]
    size_bytes = tensor_bytes(dtype, shape)
    if end - begin != size_bytes:
        raise ValueError(f"{end - begin} bytes for {dtype} {shape}")
    return Place(dtype, shape, body_begin + begin, size_bytes)
