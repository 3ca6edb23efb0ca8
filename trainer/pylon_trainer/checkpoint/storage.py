"""Files under one URI of any store that fsspec knows, with errors that a person can act on.

Writes are durable when they return: local files are flushed to the disk, object stores confirm the upload on close.
Knows nothing of checkpoints.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pylon_trainer.errors import ConfigError, StorageError, TrainerError

RETRY_DELAYS_SECONDS = (0.5, 1.0, 2.0, 4.0)
"""Waits between tries: a store that is busy or a connection that broke is usually back within seconds."""

_FINAL = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENOENT}
)
"""Errors of a disk that no retry mends."""

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "azure", "abfss": "azure", "az": "azure"}
"""The extra of this package that brings the store's client, by scheme."""

T = TypeVar("T")


class Storage:
    """A directory of a store. Paths are relative to it and use slashes."""

    def __init__(self, uri: str, *, sleep: Callable[[float], None] = time.sleep) -> None:
        """ConfigError when the URI's scheme is unknown or its client is not installed."""
        self.uri = uri.rstrip("/")
        self._sleep = sleep
        self._fs, self._root = open_store(self.uri)
        self._local = isinstance(self._fs, LocalFileSystem)

    def write(self, path: str, data: bytes) -> None:
        """Write a file and wait until it is durable. StorageError when the store refuses."""
        self._attempt("write", path, lambda: self._write(f"{self._root}/{path}", data))

    def read(self, path: str) -> bytes:
        """A file's content. FileNotFoundError when there is none, StorageError when the store refuses."""
        return self._attempt("read", path, lambda: bytes(self._fs.cat_file(f"{self._root}/{path}")))

    def names(self, path: str = "") -> list[str]:
        """Names of the files and directories right below; none when it does not exist."""
        try:
            found: list[str] = self._attempt("list", path, lambda: self._list(f"{self._root}/{path}".rstrip("/")))
        except FileNotFoundError:
            return []
        return sorted(Path(name).name for name in found)

    def remove(self, path: str) -> None:
        """Remove a file or directory with all below; nothing when it does not exist."""
        try:
            self._attempt("remove", path, lambda: self._fs.rm(f"{self._root}/{path}", recursive=True))
        except FileNotFoundError:
            return

    def _list(self, path: str) -> list[str]:
        self._fs.invalidate_cache(path)  # other processes write here too
        return [str(name) for name in self._fs.ls(path, detail=False)]

    def _write(self, path: str, data: bytes) -> None:
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        with self._fs.open(path, "wb") as file:
            file.write(data)
            if self._local:
                file.flush()
                os.fsync(file.fileno())
        if self._local:
            _sync_directory(Path(path).parent)

    def _attempt(self, verb: str, path: str, operation: Callable[[], T]) -> T:
        uri = f"{self.uri}/{path}".rstrip("/")
        for delay in (*RETRY_DELAYS_SECONDS, None):
            try:
                return operation()
            except Exception as error:  # every store brings exceptions of its own; each is translated, none swallowed
                if isinstance(error, FileNotFoundError) and verb != "write":
                    raise
                failure = _translated(error, verb, uri)
                if delay is None or _is_final(error):
                    raise failure from error
                self._sleep(delay)
        raise AssertionError("the last try returns or raises")


def open_store(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system behind a URI, and the path in it. ConfigError as Storage has it."""
    scheme = uri.partition("://")[0] if "://" in uri else "file"
    try:
        fs, root = fsspec.core.url_to_fs(uri)
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


def lacks_credentials(error: Exception) -> bool:
    """Whether a store's client found no credentials or had them refused.

    Each client has errors of its own for that, which cannot be imported here for certain; those of Google, Azure and
    HTTP carry the answer's status.
    """
    statuses = (getattr(error, field, None) for field in ("code", "status_code", "status"))
    return "Credential" in type(error).__name__ or any(status in (401, 403) for status in statuses)


def _translated(error: Exception, verb: str, uri: str) -> TrainerError:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if lacks_credentials(error):
        return ConfigError(
            f"cannot {verb} {uri}: credentials missing or refused ({line}); give them to the pods from a Secret"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"cannot {verb} {uri}: no space left there; free some or lower checkpoint.keep")
    return StorageError(f"cannot {verb} {uri}: {line}")


def _is_final(error: Exception) -> bool:
    return lacks_credentials(error) or (isinstance(error, OSError) and error.errno in _FINAL)


def _sync_directory(path: Path) -> None:
    """Make new names durable too: fsync of a file says nothing about its directory entry (fsync(2))."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
