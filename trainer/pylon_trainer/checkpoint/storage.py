"""Files under one URI of any store that fsspec knows, with errors that a person can act on.

Writes are durable when they return: local files are flushed to the disk, object stores confirm the upload and its size.
Credentials come from the environment or from files that it names, never from a URI. Knows nothing of checkpoints.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pylon_trainer.checkpoint import disk
from pylon_trainer.checkpoint.retries import Patience
from pylon_trainer.checkpoint.s3 import Bucket, S3Upload
from pylon_trainer.checkpoint.uploads import StreamUpload, Upload
from pylon_trainer.errors import ConfigError

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "azure", "abfss": "azure", "az": "azure"}
"""The extra of this package that brings the store's client, by scheme."""

_OPTIONS = {"use_listings_cache": False}
"""Other processes write here too, so no listing may come from memory."""
_OPTIONS_OF: dict[str, dict[str, Any]] = {
    scheme: {"config_kwargs": {"retries": {"total_max_attempts": 1}}} for scheme in ("s3", "s3a")
}
"""By scheme. What a client would try again in secret neither counts nor ends in time."""

_ANY_ORDER = frozenset({"file", "local", "s3", "s3a"})


class Storage:
    """A directory of a store. Paths are relative to it and use slashes.

    Its methods raise StorageError when the store refuses, ConfigError when it refuses the credentials, both after as
    many tries as help; any thread may call them.
    """

    def __init__(self, uri: str, *, sleep: Callable[[float], None] = time.sleep) -> None:
        """ConfigError when the URI's scheme is unknown, its client is not installed, or it holds a password."""
        self.uri = uri.rstrip("/")
        self._sleep = sleep
        self._fs, self._root = open_store(self.uri, **_OPTIONS, **_OPTIONS_OF.get(_scheme(self.uri), {}))
        self._is_local = isinstance(self._fs, LocalFileSystem)
        self._is_s3 = "s3" in self._fs.protocol

    def write(self, path: str, data: bytes) -> None:
        """Write a file and wait until it is durable."""
        self._patience(path).ask("write", lambda: self._write(self._full(path), data))

    def create(self, path: str, data: bytes) -> None:
        """Write a file that must not be there yet: FileExistsError when it is."""
        tries = iter(range(1_000))

        def once() -> None:
            is_first = next(tries) == 0
            try:
                self._create(self._full(path), data)
            except FileExistsError:
                # A try whose answer was lost may have been done: then what is there is ours.
                if is_first or self.read(path) != data:
                    raise

        self._patience(path).ask("write", once, answers=(FileExistsError,))

    def upload(self, path: str, size_bytes: int, *, sleep: Callable[[float], None] | None = None) -> Upload:
        """Begin a file of that many bytes that comes in parts. It must not be there yet.

        sleep: waits between tries of its parts instead of the storage's own.
        """
        full, uri = self._full(path), f"{self.uri}/{path}"
        if self._is_local:
            return disk.DiskUpload(Path(full), uri, size_bytes)
        if self._is_s3:
            return S3Upload(self._bucket, self._key(full), size_bytes, Patience(uri, sleep or self._sleep))
        return StreamUpload(self._fs, full, uri, size_bytes)

    def read(self, path: str) -> bytes:
        """A file's content. FileNotFoundError when there is none."""
        full = self._full(path)
        return self._patience(path).ask("read", lambda: bytes(self._fs.cat_file(full)), answers=(FileNotFoundError,))

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        """Fill a buffer from that byte of a file on. EOFError when the file is shorter, FileNotFoundError when there
        is none."""
        full = self._full(path)
        answers = (EOFError, FileNotFoundError)
        self._patience(path).ask("read", lambda: self._read_into(full, offset, buffer), answers)

    def reconnect(self) -> None:
        """Read what comes next over new connections, where a store's ranges are read over ones that are kept."""
        if self._is_s3:
            self._bucket.client.close()

    def size(self, path: str) -> int | None:
        """Bytes of a file; None when there is none."""
        full = self._full(path)
        try:
            return self._patience(path).ask("read", lambda: self._size(full), answers=(FileNotFoundError,))
        except FileNotFoundError:
            return None

    def names(self, path: str = "") -> list[str]:
        """Names of the files and directories right below; none when it does not exist."""
        full = self._full(path)
        try:
            found = self._patience(path).ask(
                "list", lambda: self._fs.ls(full, detail=False), answers=(FileNotFoundError,)
            )
        except FileNotFoundError:
            return []
        return sorted(Path(name).name for name in found)

    def remove(self, path: str) -> None:
        """Remove a file or directory with all below; nothing when it does not exist."""
        full = self._full(path)
        with contextlib.suppress(FileNotFoundError):
            self._patience(path).ask("remove", lambda: self._fs.rm(full, recursive=True), answers=(FileNotFoundError,))

    def unfinished(self) -> list[str]:
        """Names right below that hold uploads which were begun and never finished, where a store keeps such things out
        of sight."""
        if not self._is_s3:
            return []
        prefix = f"{self._key(self._root)}/".lstrip("/")
        found = self._patience("").ask("list", lambda: self._bucket.unfinished(prefix))
        return sorted({key.removeprefix(prefix).partition("/")[0] for key, _ in found})

    def abandon_uploads(self, path: str) -> None:
        """Drop what was begun below a directory and never finished, where a store keeps such things out of sight."""
        if self._is_s3:
            prefix = self._key(self._full(path)) + "/"
            self._patience(path).ask("remove", lambda: self._bucket.abandon_uploads(prefix))

    def _write(self, full: str, data: bytes) -> None:
        if self._is_local:
            return disk.write(Path(full), data)
        if not self._is_s3:
            self._fs.makedirs(full.rpartition("/")[0], exist_ok=True)
        self._fs.pipe_file(full, data)
        if (size_bytes := self._size(full)) != len(data):
            raise OSError(f"the store holds {size_bytes} bytes instead of {len(data)}")
        return None

    def _create(self, full: str, data: bytes) -> None:
        if self._is_local:
            disk.create(Path(full), data)
        elif self._is_s3:
            self._bucket.create(self._key(full), data)
        else:
            self._fs.makedirs(full.rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(full, data, mode="create")

    def _read_into(self, full: str, offset: int, buffer: memoryview) -> None:
        if self._is_local:
            return disk.read_into(Path(full), offset, buffer)
        if self._is_s3:
            return self._bucket.read_into(self._key(full), offset, buffer)
        data = self._fs.cat_file(full, start=offset, end=offset + len(buffer))
        if len(data) != len(buffer):
            raise EOFError(f"{full} ends at byte {offset + len(data)}")
        buffer[:] = data
        return None

    def _size(self, full: str) -> int | None:
        if self._is_s3:
            return self._bucket.size(self._key(full))
        found = self._fs.info(full)
        return int(found["size"]) if found["type"] == "file" else None

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}".rstrip("/")

    def _key(self, full: str) -> str:
        return full.partition("/")[2]

    def _patience(self, path: str) -> Patience:
        return Patience(f"{self.uri}/{path}".rstrip("/"), self._sleep)

    @cached_property
    def _bucket(self) -> Bucket:
        return Bucket(self._fs, self._root.partition("/")[0])


def takes_any_order(uri: str) -> bool:
    """Whether parts of a file there may come in any order and from several threads; told without a client, which takes
    long to make."""
    return _scheme(uri) in _ANY_ORDER


def open_store(uri: str, **options: Any) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system behind a URI, and the path in it. ConfigError as Storage has it."""
    scheme = _scheme(uri)
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise ConfigError(f"this is no URI ({error}); write <scheme>://<bucket>/<path>, or a path") from error
    if parts.password is not None:
        host = parts.netloc.rpartition("@")[2]
        raise ConfigError(
            f"{scheme}://{host}{parts.path}: this URI held a password; give credentials to the pods from a Secret"
        )
    try:
        fs, root = fsspec.core.url_to_fs(uri, **options)
    except ImportError as error:
        extra = f"pip install 'pylon-training[{_EXTRAS[scheme]}]'" if scheme in _EXTRAS else str(error)
        raise ConfigError(f"{uri}: the client for {scheme}:// is not installed: {extra}") from error
    except ValueError as error:
        if scheme in fsspec.available_protocols():
            raise ConfigError(f"{uri}: {error}") from error
        raise ConfigError(
            f"{uri}: unknown scheme {scheme}://; known are file://, s3://, gs://, az:// "
            f"and the others of fsspec ({', '.join(sorted(fsspec.available_protocols()))})"
        ) from error
    return fs, root.rstrip("/")


def _scheme(uri: str) -> str:
    return uri.partition("://")[0] if "://" in uri else "file"
