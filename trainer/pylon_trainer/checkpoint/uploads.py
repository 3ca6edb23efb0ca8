"""Files that are written part by part while more of them is still to come."""

from __future__ import annotations

import contextlib
import threading
from typing import Protocol

from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from pylon_trainer.checkpoint.retries import explained


class Upload(Protocol):
    """One file on its way. Each method raises StorageError or ConfigError, after which only abort may be called."""

    def put(self, offset: int, data: memoryview) -> None:
        """Send a part: PART_BYTES of the file from a multiple of that on, or all that is left. Any thread may; the
        store has the data when it returns."""

    def finish(self) -> None:
        """After all parts: make the file durable and see that it has its size."""

    def abort(self) -> None:
        """Leave nothing behind. No other call may be under way."""


class StreamUpload:
    """A file of any store that fsspec knows, written from its beginning to its end.

    Nothing is tried again here: a stream cannot go back, and the clients of such stores try their own blocks again.
    """

    def __init__(self, fs: AbstractFileSystem, path: str, uri: str, size_bytes: int) -> None:
        self._fs = fs
        self._path = path
        self._uri = uri
        self._size_bytes = size_bytes
        self._position = 0
        self._is_broken = False
        self._moved = threading.Condition()
        with explained("write", uri):
            fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._file = fs.open(path, "wb")

    def put(self, offset: int, data: memoryview) -> None:
        """Waits until all before it is written, so early parts need threads of their own."""
        with self._moved:
            self._moved.wait_for(lambda: self._is_broken or self._position == offset)
            self._is_broken, was_broken = True, self._is_broken
            try:
                with explained("write", self._uri):
                    if was_broken:
                        raise OSError("an earlier part failed")
                    self._file.write(data)
                self._position += len(data)
                self._is_broken = False
            finally:
                self._moved.notify_all()

    def finish(self) -> None:
        with explained("write", self._uri):
            self._file.close()
            size_bytes = self._fs.size(self._path)
            if size_bytes != self._size_bytes:
                raise OSError(f"the store holds {size_bytes} bytes instead of {self._size_bytes}")

    def abort(self) -> None:
        with explained("remove", self._uri), contextlib.suppress(FileNotFoundError):
            if isinstance(self._file, AbstractBufferedFile):
                self._file.discard()
                self._file.closed = True  # else the garbage collector would close it, and so complete it
            self._fs.rm(self._path)
