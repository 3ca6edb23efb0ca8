"""Durable files on a disk: when a call returns, the file and its name outlive a power cut.

Files come to their final names at once and are never overwritten by an upload: what makes them count is decided
elsewhere.
"""

from __future__ import annotations

import os
from pathlib import Path

from pylon_trainer.checkpoint.retries import explained

_MODE = 0o644


def write(path: Path, data: bytes, *, exclusive: bool = False) -> None:
    """FileExistsError when exclusive and there already; any error leaves no file of an exclusive write."""
    make_directories(path.parent)
    descriptor = os.open(
        path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_EXCL if exclusive else os.O_TRUNC), _MODE
    )
    try:
        _write_all(descriptor, memoryview(data), 0)
        os.fsync(descriptor)
    except OSError:
        if exclusive:
            path.unlink()
        raise
    finally:
        os.close(descriptor)
    sync_directory(path.parent)


def read_into(path: Path, offset: int, buffer: memoryview) -> None:
    """EOFError when the file ends before the buffer is full."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while buffer:
            count = os.preadv(descriptor, [buffer], offset)
            if count == 0:
                raise EOFError(f"{path} ends at byte {offset}")
            buffer, offset = buffer[count:], offset + count
    finally:
        os.close(descriptor)


class DiskUpload:
    """A file whose parts come in any order, from any thread.

    Nothing is tried again: a disk that refuses once is full or broken, and pages that a failed fsync dropped would
    look clean to a second one.
    """

    def __init__(self, path: Path, uri: str, size_bytes: int) -> None:
        """FileExistsError is a StorageError here: every save has names of its own."""
        self._path = path
        self._uri = uri
        self._size_bytes = size_bytes
        with explained("write", uri):
            make_directories(path.parent)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)

    def put(self, offset: int, data: memoryview) -> None:
        with explained("write", self._uri):
            _write_all(self._descriptor, data, offset)
            # Now, so that the disk works while later parts come: the kernel by itself starts at gigabytes.
            os.fsync(self._descriptor)

    def finish(self) -> None:
        with explained("write", self._uri):
            os.fsync(self._descriptor)
            size_bytes = os.fstat(self._descriptor).st_size
            self._close()
            if size_bytes != self._size_bytes:
                raise OSError(f"it holds {size_bytes} bytes instead of {self._size_bytes}")
            sync_directory(self._path.parent)

    def abort(self) -> None:
        self._close()
        with explained("remove", self._uri):
            self._path.unlink(missing_ok=True)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def make_directories(directory: Path) -> None:
    """With all parents, each made durable in the one above it."""
    if directory.is_dir():
        return
    make_directories(directory.parent)
    directory.mkdir(exist_ok=True)
    sync_directory(directory.parent)


def sync_directory(path: Path) -> None:
    """Make new names durable too: fsync of a file says nothing about its directory entry (fsync(2))."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
