"""What a checkpoint says of itself: its state and where each tensor lies, its files and the checksum of every part, and
the marker that makes it count.

Only bytes in, bytes out: nothing here touches a store, and nothing here needs torch, because the process that writes
checkpoints and the command line that looks at them do without it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import xxhash

MANIFEST = "manifest.json"
COMMITTED = "COMMITTED"
"""The marker: a checkpoint without it, or with another manifest than it names, does not exist."""

PART_BYTES = 32 * 2**20
"""Files are copied, hashed, sent and read in parts of this size. S3 takes at most 10 000 parts, each of at least 5 MiB:
this allows files of 312 GiB, and keeps a checksum's share of the manifest below 2 bytes per MiB."""

TENSOR = "__tensor__"
"""In a tree, a dictionary with this key alone stands for a tensor: {"file", "key", "dtype", "shape"}."""

_FORMAT = 2


class DamagedCheckpoint(Exception):
    """What was read is not what was written. Its text names the file."""


def checksum(data: bytes | bytearray | memoryview) -> str:
    """XXH3, 128 bits: it finds damage at memory speed; it is no defence against an attacker."""
    return str(xxhash.xxh3_128_hexdigest(data))


@dataclass(frozen=True, slots=True)
class Part:
    """A range of a file and the checksum that its bytes must have."""

    number: int
    offset: int
    length: int
    checksum: str

    def verify(self, file: str, data: bytes | bytearray | memoryview) -> None:
        """DamagedCheckpoint when the data is not this part of the file."""
        if checksum(data) != self.checksum:
            end = self.offset + self.length
            raise DamagedCheckpoint(f"checksum of {file} differs in part {self.number}, bytes {self.offset} to {end}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file: checksum i is that of bytes i * part_bytes up to (i + 1) * part_bytes, or to the end."""

    size_bytes: int
    part_bytes: int
    checksums: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.part_bytes < 1 or len(self.checksums) != -(-self.size_bytes // self.part_bytes):
            raise ValueError(f"{len(self.checksums)} parts of {self.part_bytes} bytes are not {self.size_bytes} bytes")

    def parts(self) -> Iterator[Part]:
        """All parts, in order."""
        for number, expected in enumerate(self.checksums):
            offset = number * self.part_bytes
            yield Part(number, offset, min(self.part_bytes, self.size_bytes - offset), expected)


@dataclass(frozen=True, slots=True)
class Manifest:
    """One checkpoint: nested dictionaries with string keys whose leaves are JSON values, or stand for a tensor."""

    step: int
    attempt: int
    ranks: int
    files: dict[str, FileEntry]
    """By name, next to the manifest."""
    replicated: dict[str, Any]
    """What was equal on all ranks; its tensors are divided over the files."""
    own: list[dict[str, Any]]
    """What each rank had for itself, by rank."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all files, without the manifest itself."""
        return sum(file.size_bytes for file in self.files.values())

    def dump(self) -> bytes:
        """Equal manifests give equal bytes."""
        files = {
            name: {"size_bytes": file.size_bytes, "part_bytes": file.part_bytes, "checksums": file.checksums}
            for name, file in self.files.items()
        }
        fields = {"format": _FORMAT, "step": self.step, "attempt": self.attempt, "ranks": self.ranks, "files": files}
        fields |= {"replicated": self.replicated, "own": self.own}
        return json.dumps(fields, separators=(",", ":")).encode()

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """DamagedCheckpoint when it does not parse, or is of a format that this version does not read."""
        try:
            fields = json.loads(data)
            if (version := fields.pop("format")) != _FORMAT:
                raise DamagedCheckpoint(f"{MANIFEST} is of format {version}; this version reads format {_FORMAT}")
            files = {
                name: FileEntry(entry["size_bytes"], entry["part_bytes"], tuple(entry["checksums"]))
                for name, entry in fields.pop("files").items()
            }
            return cls(files=files, **fields)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DamagedCheckpoint(f"{MANIFEST} does not parse") from error


def placeholders(tree: Any) -> Iterator[dict[str, Any]]:
    """What a tree says of each of its tensors: "file", "key" in that file, "dtype" as torch names it, "shape"."""
    if isinstance(tree, dict):
        if TENSOR in tree:
            yield tree[TENSOR]
        else:
            for value in tree.values():
                yield from placeholders(value)


@dataclass(frozen=True, slots=True)
class Marker:
    """The commit: which manifest counts, and since when. One line that ends with its own checksum."""

    manifest_checksum: str
    committed_time: datetime

    def dump(self) -> bytes:
        line = f"{self.manifest_checksum} {self.committed_time.isoformat()}"
        return f"{line} {checksum(line.encode())}\n".encode()

    @classmethod
    def parse(cls, data: bytes) -> Marker:
        """DamagedCheckpoint unless it is, byte for byte, what dump gave."""
        try:
            manifest_checksum, committed_time, _ = data.decode("ascii").split(" ")
            marker = cls(manifest_checksum, datetime.fromisoformat(committed_time))
        except ValueError as error:
            raise DamagedCheckpoint(f"{COMMITTED} does not parse") from error
        if marker.dump() != data:
            raise DamagedCheckpoint(f"{COMMITTED} is not what was written")
        return marker
