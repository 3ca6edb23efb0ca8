"""Torch's own ways to save, which Pylon's is compared with: async_save in a thread or a process, and torch.save.

They are used as their makers mean them to be where the stall matters: staging is asynchronous, into page-locked memory
that is kept from save to save, and waited for before the optimizer changes the state. Files are flushed to the disk.
"""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import fsspec
import torch
import torch.distributed as dist
from checkpoint_limits import local_path, remove
from checkpoint_loop import Save, State
from torch import Tensor
from torch.distributed.checkpoint import _async_process_executor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save

try:
    from torch.distributed.checkpoint.fsspec_filesystem import FsspecReader, FsspecWriter
except ImportError:  # its name up to torch 2.12
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

SHARED_MEMORY = Path("/dev/shm")
WRITER_THREADS = min(8, os.cpu_count() or 1)
"""Files that torch.distributed.checkpoint writes at once; its default is one."""


class TorchSave:
    """torch.save to one file: training waits until it is durable."""

    def __init__(self, state: State, uri: str) -> None:
        self._state = state
        self._uri = uri

    def begin(self, number: int) -> Save:
        uri = f"{self._uri}/{number}"
        fs, path = fsspec.core.url_to_fs(uri)
        fs.makedirs(path, exist_ok=True)
        with fs.open(f"{path}/state.pt", "wb") as file:
            torch.save(self._state, file)
            if local_path(uri) is not None:
                file.flush()
                os.fsync(file.fileno())
        return _Over(time.perf_counter())

    def release(self) -> None: ...

    def read(self, number: int, group: str, name: str) -> Tensor:
        uri = f"{self._uri}/{number}"
        path = local_path(uri)
        with fsspec.open(f"{uri}/state.pt", "rb") as file:
            state = torch.load(file if path is None else path / "state.pt", map_location="cpu", mmap=path is not None)
        tensor: Tensor = state[group][name]
        return tensor

    def remove(self, number: int) -> None:
        remove(f"{self._uri}/{number}")

    def close(self) -> None: ...


class _Over:
    """A save that was over when its call returned."""

    copied_s: float | None = None

    def __init__(self, durable_s: float) -> None:
        self.durable_s: float | None = durable_s

    def is_done(self) -> bool:
        return True


class DistributedCheckpoint:
    """torch.distributed.checkpoint.async_save with its staging in the background, in a world of one."""

    def __init__(self, state: State, uri: str, kind: AsyncCheckpointerType) -> None:
        on_device = state["model"][next(iter(state["model"]))].is_cuda
        self._state = state
        self._uri = uri
        self._kind = kind
        in_process = kind is AsyncCheckpointerType.PROCESS
        if in_process:
            _refuse_small_shared_memory(state, uri)
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=on_device,
                use_shared_memory=in_process,
                use_async_staging=True,
                use_non_blocking_copy=on_device,
            )
        )
        # Up to torch 2.11 every save closes what stages, which then cannot stage again: closing is for the end here.
        self._closes = [
            (part, part.close) for part in (self._stager, getattr(self._stager, "_state_dict_stager", None)) if part
        ]
        for part, _ in self._closes:
            part.close = lambda: None
        self._staged: Future[None] | None = None
        self._owns_group = not dist.is_initialized()
        if self._owns_group:
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")  # where its process finds the ranks'
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def begin(self, number: int) -> Save:
        # Its copies go to a stream of their own that waits for nothing, and so may copy a state whose update has not
        # come to its turn on the device. Let that stream wait: no order costs less.
        if (stream := getattr(self._stager, "_staging_stream", None)) is not None:
            stream.wait_stream(torch.accelerator.current_stream())
        response: Any = async_save(
            self._state,
            storage_writer=_writer(f"{self._uri}/{number}"),
            async_checkpointer_type=self._kind,
            async_stager=self._stager,
        )
        self._staged = response.staging_completion
        return _Uploading(response.staging_completion, response.upload_completion)

    def release(self) -> None:
        if self._staged is not None:
            self._staged.result()
            self._staged = None

    def read(self, number: int, group: str, name: str) -> Tensor:
        uri = f"{self._uri}/{number}"
        state = {group: {name: torch.empty_like(self._state[group][name], device="cpu")}}
        path = local_path(uri)
        load(state, storage_reader=FsspecReader(uri) if path is None else FileSystemReader(path))
        return state[group][name]

    def remove(self, number: int) -> None:
        remove(f"{self._uri}/{number}")

    def close(self) -> None:
        for _, close in self._closes:
            close()
        # The process lives as long as this reference, and holds on to the staged memory.
        _async_process_executor._CHECKPOINT_PROCESS = None
        if self._owns_group:
            dist.destroy_process_group()


def _refuse_small_shared_memory(state: State, uri: str) -> None:
    """OSError in good time: memory that /dev/shm has no room for ends the process with SIGBUS when it is touched."""
    if not SHARED_MEMORY.is_dir():
        return
    needed = sum(tensor.nbytes for group in state.values() for tensor in group.values())
    path = local_path(uri)
    if path is not None and path.is_relative_to(SHARED_MEMORY):
        needed *= 2  # the checkpoint is there too
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < needed:
        raise OSError(f"{SHARED_MEMORY} has {free} bytes free; to stage for another process takes {needed}")


def _writer(uri: str) -> FileSystemWriter:
    path = local_path(uri)
    if path is None:
        return FsspecWriter(uri, thread_count=WRITER_THREADS)
    return FileSystemWriter(path, thread_count=WRITER_THREADS)


class _Uploading:
    """A save that two futures speak of."""

    def __init__(self, staged: Future[None], uploaded: Future[Any]) -> None:
        self.copied_s: float | None = None
        self.durable_s: float | None = None
        self._uploaded = uploaded
        staged.add_done_callback(self._note_copied)
        uploaded.add_done_callback(self._note_durable)

    def is_done(self) -> bool:
        if self._uploaded.done():
            self._uploaded.result()
        return self.durable_s is not None

    def _note_copied(self, _: object) -> None:
        self.copied_s = time.perf_counter()

    def _note_durable(self, _: object) -> None:
        self.durable_s = time.perf_counter()
