"""Sources: which files a list of globs names, in any store that fsspec knows, and their bytes.

The only module of data that imports fsspec, and the place where a store's many ways to fail become errors for people.
The order is by name, so every rank and every attempt sees the same files.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from pylon_trainer.checkpoint.retries import lacks_credentials
from pylon_trainer.checkpoint.storage import open_store
from pylon_trainer.errors import ConfigError, DataError, StorageError

STANDARD_LIBRARY = "python://stdlib/"
NOT_STANDARD = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "config"})


@dataclass(frozen=True, slots=True)
class File:
    """A file in a store."""

    uri: str
    """Stable name, the same on every machine that sees the same store."""
    filesystem: AbstractFileSystem
    path: str
    size: int
    """Bytes, as stored."""

    @property
    def compressed(self) -> bool:
        """Whether it is gzip, which can only be read from the start."""
        return self.path.endswith(".gz")

    def read(self, start: int = 0, end: int | None = None) -> bytes:
        """The stored bytes start..end."""
        with explained(self.uri):
            data: bytes = self.filesystem.cat_file(self.path, start=start, end=end)
        return data

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """A stream of the content, decompressed."""
        with (
            explained(self.uri),
            self.filesystem.open(self.path, "rb", compression="gzip" if self.compressed else None) as stream,
        ):
            yield stream


def list_files(globs: Sequence[str], field: str) -> list[File]:
    """Every file that some glob matches, once, ordered by name, without empty ones.

    field: what the manifest calls the globs, for errors. Raises DataError when a glob matches nothing or all files are
    empty, ConfigError for a scheme that is unknown or lacks its module.
    """
    files: dict[str, File] = {}
    for glob in globs:
        matched = _standard_library(glob, field) if glob.startswith("python://") else _stored(glob, field)
        if not matched:
            hint = "" if "*" in glob else " (a directory needs a glob, such as /**/*.txt)"
            raise DataError(f"{field}: {glob} matches no file{hint}")
        files.update((file.uri, file) for file in matched)
    filled = [files[uri] for uri in sorted(files) if files[uri].size]
    if not filled:
        raise DataError(f"{field}: all {len(files)} files are empty ({', '.join(globs)})")
    return filled


def read_file(uri: str, field: str) -> bytes:
    """The content of one file. Errors as list_files has them."""
    filesystem, path = _resolve(uri, field)
    with explained(f"{field}: {uri}"):
        data: bytes = filesystem.cat_file(path)
    return data


def _stored(glob: str, field: str) -> list[File]:
    filesystem, path = _resolve(glob, field)
    with explained(f"{field}: {glob}"):
        found: dict[str, dict[str, object]] = filesystem.glob(path, detail=True)
        return [
            File(filesystem.unstrip_protocol(name), filesystem, name, int(str(info["size"] or 0)))
            for name, info in found.items()
            if info["type"] == "file"
        ]


def _standard_library(glob: str, field: str) -> list[File]:
    """The interpreter's own sources, under names that are the same wherever Python is installed."""
    if not glob.startswith(STANDARD_LIBRARY):
        raise ConfigError(f"{field}: {glob} is unknown, the only python:// source is {STANDARD_LIBRARY}**/*.py")
    root = Path(sysconfig.get_path("stdlib"))
    local = LocalFileSystem()
    return [
        File(STANDARD_LIBRARY + place.as_posix(), local, str(path), path.stat().st_size)
        for path in root.glob(glob.removeprefix(STANDARD_LIBRARY))
        if path.is_file() and NOT_STANDARD.isdisjoint((place := path.relative_to(root)).parts)
    ]


def _resolve(uri: str, field: str) -> tuple[AbstractFileSystem, str]:
    try:
        return open_store(uri)
    except ConfigError as error:
        raise ConfigError(f"{field}: {error}") from error


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn a store's errors into one line about `what`: DataError for what only a person can mend, StorageError for
    what another try may."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{what}: no such file") from error
    except PermissionError as error:
        raise DataError(f"{what}: access denied ({_one_line(error)}); check the credentials") from error
    except Exception as error:
        if lacks_credentials(error):
            raise DataError(
                f"{what}: credentials missing or refused ({_one_line(error)}); give them to the pods from a Secret"
            ) from error
        if isinstance(error, OSError):
            raise StorageError(f"{what}: cannot be read ({_one_line(error)})") from error
        raise


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
