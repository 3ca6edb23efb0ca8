"""Pylon's way to save, as the trainer does it: slabs, copier, writer process, archive; of a world of one.

The trainer looks for endings once in a step; here a thread waits for them, so that the time of a save does not depend
on the length of a step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import fsspec
import safetensors
import safetensors.torch
from checkpoint_limits import local_path
from checkpoint_loop import Save, State
from torch import Tensor

from pylon_trainer.checkpoint.archive import Archive
from pylon_trainer.checkpoint.manifest import PART_BYTES, Manifest
from pylon_trainer.checkpoint.orders import Committed, Durable, Failed
from pylon_trainer.checkpoint.share import Divider, file_of
from pylon_trainer.checkpoint.slab import Slabs
from pylon_trainer.checkpoint.staging import Staging
from pylon_trainer.checkpoint.storage import Storage
from pylon_trainer.checkpoint.writer_handle import WriterHandle
from pylon_trainer.errors import TrainerError

FILE = file_of(0)
ATTEMPT = 1
KEEP = 1000
"""Old ones are removed where no step is measured."""
PATIENCE_SECONDS = 60.0


class SlabCheckpoint:
    """Two slabs, and an attempt of its own in the store."""

    def __init__(self, state: State, uri: str) -> None:
        self._state = state
        self._uri = uri
        self._archive = Archive(Storage(uri), ATTEMPT, KEEP)
        self._archive.claim()
        self._names: dict[int, str] = {}
        device = next(iter(state["model"].values())).device
        self._divider = Divider(rank=0, ranks=1)
        self._layout = self._divider.share(state, {}).layout
        self._slabs = Slabs.open(self._layout.size_bytes, 3 * self._layout.size_bytes, PART_BYTES, device)
        for notice in self._slabs.notices:
            print(f"  {notice}", flush=True)
        self._writer = WriterHandle.open(self._slabs.arena, [uri])
        self._copied = _CopiedWriter(self._writer, self._layout.size_bytes)
        self._staging = Staging(device, self._slabs, self._copied)
        self._uploads = 0

    def begin(self, number: int) -> Save:
        name = self._names[number] = self._archive.new_name(number)
        share = self._divider.share(self._state, {})
        save = _SlabSave(self._writer, lambda durable: self._commit(name, number, share.replicated, durable))
        self._copied.save = save
        self._uploads += 1
        self._writer.begin(self._uploads, self._uri, f"{name}/{FILE}", self._layout.size_bytes)
        if self._staging.begin(share.tensors, self._layout, [self._uploads]) is None:
            raise TrainerError("no slab is free, though the save before is over")
        save.wait_in_thread()
        return save

    def _commit(self, name: str, step: int, values: dict[str, object], durable: Durable) -> None:
        manifest = Manifest(
            step=step,
            attempt=ATTEMPT,
            ranks=1,
            files={FILE: durable.entry},
            replicated=values,
            own=[{}],
        )
        self._uploads += 1
        self._writer.commit(self._uploads, self._uri, ATTEMPT, KEEP, name, manifest)

    def release(self) -> None:
        self._staging.release()

    def read(self, number: int, group: str, name: str) -> Tensor:
        uri = f"{self._uri}/{self._names[number]}/{FILE}"
        path = local_path(uri)
        key = f"{group}/{name}"
        if path is None:
            with fsspec.open(uri, "rb") as file:
                return safetensors.torch.load(file.read())[key]
        with safetensors.safe_open(path, "pt") as whole:
            tensor: Tensor = whole.get_tensor(key)
            return tensor

    def remove(self, number: int) -> None:
        self._archive.remove(self._names[number])

    def close(self) -> None:
        is_idle = self._staging.close(PATIENCE_SECONDS)
        self._writer.close(PATIENCE_SECONDS)
        if is_idle:
            self._slabs.close()


class _SlabSave:
    """A save whose file, then whose commit, the writer answers for."""

    def __init__(self, writer: WriterHandle, commit: Callable[[Durable], None]) -> None:
        self.copied_s: float | None = None
        self.durable_s: float | None = None
        self._writer = writer
        self._commit = commit
        self._failure: TrainerError | None = None

    def is_done(self) -> bool:
        if self._failure is not None:
            raise self._failure
        return self.durable_s is not None

    def wait_in_thread(self) -> None:
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        while self.durable_s is None and self._failure is None:
            self._writer.wait(PATIENCE_SECONDS)
            for ending in self._writer.poll():
                match ending:
                    case Durable():
                        self._commit(ending)
                    case Committed():
                        self.durable_s = time.perf_counter()
                    case Failed():
                        self._failure = ending.error()


class _CopiedWriter:
    """The writer as staging sees it, which notes when the last part of a file has been copied."""

    def __init__(self, writer: WriterHandle, size_bytes: int) -> None:
        self.save: _SlabSave | None = None
        self._writer = writer
        self._size_bytes = size_bytes

    def part(self, upload: int, offset_in_file: int, offset_in_arena: int, length: int) -> None:
        if self.save is not None and offset_in_file + length == self._size_bytes:
            self.save.copied_s = time.perf_counter()
        self._writer.part(upload, offset_in_file, offset_in_arena, length)

    def listen(self, taken: Callable[[int, int], None], ended: Callable[[int], None]) -> None:
        self._writer.listen(taken, ended)
