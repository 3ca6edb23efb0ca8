"""Reads checkpoints' bytes and tells what is not as it was written. Changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from pylon_trainer.checkpoint.archive import Found
from pylon_trainer.checkpoint.manifest import DamagedCheckpoint, FileEntry, Part
from pylon_trainer.checkpoint.second_look import confirmed
from pylon_trainer.checkpoint.storage import Storage

READERS = 4
"""Parts that are read at the same time, each into a buffer of its own: one connection seldom fills a network."""


def audit(storage: Storage, found: Found, read: Callable[[int], None] = lambda _: None) -> Iterator[str]:
    """One line for each file that is missing or has another length, and for each part whose bytes differ.

    read: told the bytes of each part that was read.
    """
    readers = ThreadPoolExecutor(READERS)
    try:
        for file, entry in found.manifest.files.items():
            path = f"{found.name}/{file}"
            if damage := _damage(check_size, storage, path, entry):
                yield damage
                continue
            damages = readers.map(partial(_damage, _read_and_forget, storage, path), entry.parts())
            for part, damaged in zip(entry.parts(), damages, strict=True):
                read(part.length)
                if damaged:
                    yield damaged
    finally:
        readers.shutdown(cancel_futures=True)  # whoever stops early does not wait for the rest


def check_size(storage: Storage, path: str, entry: FileEntry) -> None:
    """DamagedCheckpoint when the file at this path is missing or has another length."""

    def look() -> None:
        size_bytes = storage.size(path)
        if size_bytes != entry.size_bytes:
            had = "is missing" if size_bytes is None else f"has {size_bytes} bytes instead of {entry.size_bytes}"
            raise DamagedCheckpoint(f"{_file(path)} {had}")

    confirmed(storage, look)


def read_part(storage: Storage, path: str, part: Part, data: memoryview) -> None:
    """A part of the file at this path into memory of its length. DamagedCheckpoint when it is not what was written."""

    def look() -> None:
        try:
            storage.read_into(path, part.offset, data)
        except (FileNotFoundError, EOFError) as error:
            raise DamagedCheckpoint(f"{_file(path)} was removed or cut while it was read") from error
        part.verify(_file(path), data)

    confirmed(storage, look)


def _read_and_forget(storage: Storage, path: str, part: Part) -> None:
    read_part(storage, path, part, memoryview(bytearray(part.length)))


def _damage(check: Callable[..., None], *arguments: object) -> str | None:
    try:
        check(*arguments)
    except DamagedCheckpoint as damage:
        return str(damage)
    return None


def _file(path: str) -> str:
    return path.rpartition("/")[2]
