"""Reads one file of a checkpoint into memory, every part verified before anything of it is used."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from pylon_trainer.checkpoint.layout import Layout
from pylon_trainer.checkpoint.manifest import DamagedCheckpoint, FileEntry, Part
from pylon_trainer.checkpoint.storage import Storage

_READERS = 4
"""Parts that one rank reads at the same time: one connection seldom fills a network."""


def read_tensors(storage: Storage, path: str, entry: FileEntry) -> dict[str, Tensor]:
    """The tensors of a file by their keys, on the CPU, as views of its bytes.

    DamagedCheckpoint when the file is not what was written, StorageError when the store refuses.
    """
    file = path.rpartition("/")[2]
    size_bytes = storage.size(path)
    if size_bytes != entry.size_bytes:
        had = "is missing" if size_bytes is None else f"has {size_bytes} bytes instead of {entry.size_bytes}"
        raise DamagedCheckpoint(f"{file} {had}")
    data = torch.empty(entry.size_bytes, dtype=torch.uint8)
    memory = data.numpy().data

    def read_part(part: Part) -> None:
        view = memory[part.offset : part.offset + part.length]
        storage.read_into(path, part.offset, view)
        part.verify(file, view)

    try:
        with ThreadPoolExecutor(_READERS) as readers:
            list(readers.map(read_part, entry.parts()))
    except (FileNotFoundError, EOFError) as error:
        raise DamagedCheckpoint(f"{file} was removed or cut while it was read") from error
    return {
        key: data[place.offset : place.offset + place.size_bytes].view(getattr(torch, place.dtype)).view(place.shape)
        for key, place in Layout.parse(memory).places.items()
    }


def empty_tensor(place: Mapping[str, Any]) -> Tensor:
    """Memory on the CPU for a tensor that stands in a manifest."""
    return torch.empty(place["shape"], dtype=getattr(torch, place["dtype"]))
