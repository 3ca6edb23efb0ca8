"""The ways to save that are compared: Pylon's slab, torch.distributed.checkpoint in a thread or process, torch.save.

Each is used as its makers mean it to be used where the stall matters: staging is asynchronous, into page-locked memory
that is kept from save to save, and waited for before the optimizer changes the state. Files are flushed to the disk.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import Future
from typing import Any

import fsspec
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpoint_limits import local_path
from checkpoint_loop import Save, State
from torch import Tensor
from torch.distributed.checkpoint import _async_process_executor
from torch.distributed.checkpoint.fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

WRITER_THREADS = min(8, os.cpu_count() or 1)
"""Files that torch.distributed.checkpoint writes at once; its default is one."""


class TorchSave:
    """torch.save to one file: training waits until it is durable."""

    def __init__(self, state: State) -> None:
        self._state = state

    def begin(self, uri: str) -> Save:
        fs, path = fsspec.core.url_to_fs(uri)
        fs.makedirs(path, exist_ok=True)
        with fs.open(f"{path}/state.pt", "wb") as file:
            torch.save(self._state, file)
            if local_path(uri) is not None:
                file.flush()
                os.fsync(file.fileno())
        return _Over(time.perf_counter())

    def release(self) -> None: ...

    def read(self, uri: str, group: str, name: str) -> Tensor:
        path = local_path(uri)
        with fsspec.open(f"{uri}/state.pt", "rb") as file:
            state = torch.load(file if path is None else path / "state.pt", map_location="cpu", mmap=path is not None)
        return state[group][name]

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

    def __init__(self, state: State, kind: AsyncCheckpointerType) -> None:
        on_device = state["model"][next(iter(state["model"]))].is_cuda
        self._state = state
        self._kind = kind
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=on_device,
                use_shared_memory=True,
                use_async_staging=True,
                use_non_blocking_copy=on_device,
            )
        )
        self._staged: Future[None] | None = None
        if not dist.is_initialized():
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")  # where its process finds the ranks'
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def begin(self, uri: str) -> Save:
        # Its copies go to a stream of their own that waits for nothing, and so may copy a state whose update has not
        # come to its turn on the device. Let that stream wait: no order costs less.
        if (stream := getattr(self._stager, "_staging_stream", None)) is not None:
            stream.wait_stream(torch.accelerator.current_stream())
        response: Any = dcp.async_save(
            self._state,
            storage_writer=_writer(uri),
            async_checkpointer_type=self._kind,
            async_stager=self._stager,
        )
        self._staged = response.staging_completion
        return _Uploading(response.staging_completion, response.upload_completion)

    def release(self) -> None:
        if self._staged is not None:
            self._staged.result()
            self._staged = None

    def read(self, uri: str, group: str, name: str) -> Tensor:
        state = {group: {name: torch.empty_like(self._state[group][name], device="cpu")}}
        path = local_path(uri)
        dcp.load(state, storage_reader=FsspecReader(uri) if path is None else dcp.FileSystemReader(path))
        return state[group][name]

    def close(self) -> None:
        self._stager.close()
        # The process lives as long as this reference, and holds on to the staged memory.
        _async_process_executor._CHECKPOINT_PROCESS = None


def _writer(uri: str) -> dcp.FileSystemWriter:
    path = local_path(uri)
    if path is None:
        return FsspecWriter(uri, thread_count=WRITER_THREADS)
    return dcp.FileSystemWriter(path, thread_count=WRITER_THREADS)


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
