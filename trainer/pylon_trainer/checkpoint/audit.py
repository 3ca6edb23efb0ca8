"""Reads every byte of a checkpoint and tells what is not as it was written. Changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from pylon_trainer.checkpoint.archive import Found
from pylon_trainer.checkpoint.manifest import DamagedCheckpoint, FileEntry, Part
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
            if damage := _damage_of_file(storage, found.name, file, entry):
                yield damage
                continue
            damages = readers.map(partial(_damage_of_part, storage, found.name, file), entry.parts())
            for part, damaged in zip(entry.parts(), damages, strict=True):
                read(part.length)
                if damaged:
                    yield damaged
    finally:
        readers.shutdown(cancel_futures=True)  # whoever stops early does not wait for the rest


def _damage_of_file(storage: Storage, name: str, file: str, entry: FileEntry) -> str | None:
    size_bytes = storage.size(f"{name}/{file}")
    if size_bytes is None:
        return f"{file} is missing"
    if size_bytes != entry.size_bytes:
        return f"{file} has {size_bytes} bytes instead of {entry.size_bytes}"
    return None


def _damage_of_part(storage: Storage, name: str, file: str, part: Part) -> str | None:
    data = memoryview(bytearray(part.length))
    try:
        storage.read_into(f"{name}/{file}", part.offset, data)
        part.verify(file, data)
    except (FileNotFoundError, EOFError):
        return f"{file} was removed or cut while it was read"
    except DamagedCheckpoint as damage:
        return str(damage)
    return None
