"""Reads one file of a checkpoint into memory, every part verified before anything of it is used."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from pylon_trainer.checkpoint.audit import READERS, check_size, read_part
from pylon_trainer.checkpoint.layout import Layout
from pylon_trainer.checkpoint.manifest import FileEntry, Part
from pylon_trainer.checkpoint.storage import Storage


def read_tensors(storage: Storage, path: str, entry: FileEntry) -> dict[str, Tensor]:
    """The tensors of a file by their keys, on the CPU, as views of its bytes.

    DamagedCheckpoint when the file is not what was written, StorageError when the store refuses.
    """
    check_size(storage, path, entry)
    data = torch.empty(entry.size_bytes, dtype=torch.uint8)
    memory = data.numpy().data

    def read(part: Part) -> None:
        read_part(storage, path, part, memory[part.offset : part.offset + part.length])

    with ThreadPoolExecutor(READERS) as readers:
        list(readers.map(read, entry.parts()))
    return {
        key: data[place.offset : place.offset + place.size_bytes].view(getattr(torch, place.dtype)).view(place.shape)
        for key, place in Layout.parse(memory).places.items()
    }


def empty_tensor(place: Mapping[str, Any]) -> Tensor:
    """Memory on the CPU for a tensor that stands in a manifest."""
    return torch.empty(place["shape"], dtype=getattr(torch, place["dtype"]))
