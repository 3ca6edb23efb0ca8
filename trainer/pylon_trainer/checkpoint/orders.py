"""What a rank asks of its writer, and what the writer says back. Small, and picklable without torch.

Every Begin ends in one Durable or Failed, every Commit in one Committed or Failed.
"""

from __future__ import annotations

from dataclasses import dataclass

from pylon_api.run import CheckpointReport
from pylon_trainer.checkpoint.manifest import FileEntry, Manifest
from pylon_trainer.errors import TrainerError


@dataclass(frozen=True, slots=True)
class Begin:
    """A file of this many bytes is to be written below a storage's URI. It must not be there yet."""

    upload: int
    """The caller's number for it, never used before."""
    uri: str
    path: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Part:
    """The arena holds this range of the file: PART_BYTES from a multiple of that on, or all that is left.

    Parts of one file come in the order of their offsets; the range stays as it is until the part is taken.
    """

    upload: int
    offset_in_file: int
    offset_in_arena: int
    length: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """Give a file up and remove what there is of it. Nothing when it has ended."""

    upload: int


@dataclass(frozen=True, slots=True)
class Commit:
    """Make a checkpoint count whose files are all durable, then remove older ones."""

    upload: int
    """A number to answer with."""
    uri: str
    attempt: int
    keep: int
    name: str
    manifest: Manifest
    """As an object, which goes to the writer's process in a fraction of the time that its text takes to write: for
    thousands of tensors that is tens of milliseconds, and no business of the thread that trains."""


@dataclass(frozen=True, slots=True)
class Discard:
    """Remove what there is of a save that was given up. Nobody is answered."""

    uri: str
    attempt: int
    keep: int
    name: str


Order = Begin | Part | Cancel | Commit | Discard


@dataclass(frozen=True, slots=True)
class Taken:
    """A part's range of the arena may change, as far as this file is concerned."""

    upload: int
    offset_in_file: int


@dataclass(frozen=True, slots=True)
class Durable:
    """A file is written, flushed and has its size."""

    upload: int
    entry: FileEntry


@dataclass(frozen=True, slots=True)
class Committed:
    upload: int
    report: CheckpointReport


@dataclass(frozen=True, slots=True)
class Failed:
    """A file or commit was given up. Nothing reads the arena for it any more."""

    upload: int
    message: str
    cause: type[TrainerError]
    """StorageError; ConfigError when credentials are missing or refused; PeerLost when a newer attempt has begun."""

    def error(self) -> TrainerError:
        """To raise where the save was asked for."""
        return self.cause(self.message)


Answer = Taken | Durable | Committed | Failed
End = Durable | Committed | Failed
