"""The memory that a checkpoint is copied into, and that another process writes to the store from.

One arena per rank: shared memory, mapped once and never grown, page-locked when copies come from a CUDA device. It is
cut into slabs. A slab holds a whole file (its bytes are the file's) or, when memory is short, a window of parts that
moves through the file. What goes in, and when, is not decided here.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import sys
import tempfile
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python's mmap does not name it yet
_HOST_REGISTER_PORTABLE = 1
_MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_SHARE_OF_MEMORY = 4


class Arena:
    """Shared memory that a child process can map by `fd` (give it in pass_fds)."""

    def __init__(self, size_bytes: int, *, pin: bool) -> None:
        """Take the memory, every page of it now, so that no save pays for the first touch. OSError if there is none.

        pin: page-lock it for CUDA; is_pinned tells whether that was granted.
        """
        self.size_bytes = math.ceil(size_bytes / mmap.PAGESIZE) * mmap.PAGESIZE
        self.fd = _open_memory(self.size_bytes)
        try:
            memory = mmap.mmap(self.fd, self.size_bytes)
            self.buffer = memoryview(memory)
            self.bytes = torch.frombuffer(memory, dtype=torch.uint8)
            """The same memory as a tensor."""
            self._populate(memory)
        except OSError:
            os.close(self.fd)
            raise
        # torch's own pin_memory would round up to a power of two, and its memory cannot be shared.
        self.is_pinned = pin and page_lock(self.bytes)

    def close(self) -> None:
        """Give the memory back once no view of it is left. Nothing may be copying any more."""
        if self.is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr())
            self.is_pinned = False
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        # The mapping goes with its last view; closing it here would leave other views pointing at nothing.
        self.buffer = memoryview(b"")
        self.bytes = torch.empty(0, dtype=torch.uint8)

    def _populate(self, memory: mmap.mmap) -> None:
        if sys.platform == "linux":
            with suppress(OSError):  # whether shared memory may have huge pages is the node's choice
                memory.madvise(mmap.MADV_HUGEPAGE)
            try:
                memory.madvise(_MADV_POPULATE_WRITE)
                return
            except OSError as error:
                if error.errno != errno.EINVAL:  # unknown to an older kernel
                    raise
        self.bytes[:: mmap.PAGESIZE] = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """How a budget is cut into slabs."""

    slabs: int
    slab_bytes: int
    is_whole: bool
    """Whether a slab holds the whole file."""

    @classmethod
    def of(cls, file_bytes: int, budget_bytes: int, part_bytes: int) -> Plan:
        """Two slabs if they fit, else one, else a window of as many parts as fit, but never less than one part."""
        whole = math.ceil(file_bytes / mmap.PAGESIZE) * mmap.PAGESIZE
        if whole <= budget_bytes or whole <= part_bytes:
            return cls(min(2, max(1, budget_bytes // whole)), whole, is_whole=True)
        return cls(1, max(1, budget_bytes // part_bytes) * part_bytes, is_whole=False)


@dataclass(frozen=True, slots=True)
class Slab:
    """A range of the arena that one save fills at a time."""

    offset: int
    size_bytes: int


class Slabs:
    """The slabs of one rank, in one arena. Taking and giving back is safe from any thread."""

    def __init__(self, plan: Plan, part_bytes: int, *, pin: bool) -> None:
        self.plan = plan
        self.part_bytes = part_bytes
        self.arena = Arena(plan.slabs * plan.slab_bytes, pin=pin)
        self._lacks_pin = pin and not self.arena.is_pinned
        self._free = deque(Slab(number * plan.slab_bytes, plan.slab_bytes) for number in range(plan.slabs))

    @classmethod
    def open(cls, file_bytes: int, budget_bytes: int, part_bytes: int, device: torch.device) -> Self:
        """Slabs for files of this size, within the budget (but for a single part), page-locked for a CUDA device."""
        return cls(Plan.of(file_bytes, budget_bytes, part_bytes), part_bytes, pin=device.type == "cuda")

    @property
    def notices(self) -> list[str]:
        """What a person should know of how this rank saves."""
        size = f"{self.arena.size_bytes / 2**20:.0f} MiB"
        notices = []
        if not self.plan.is_whole:
            notices.append(
                f"checkpoints pass through {size} of host memory, which does not hold this rank's share: a save makes "
                "the optimizer wait for the store; raise training.checkpoint.hostMemoryBytes"
            )
        elif self.plan.slabs == 1:
            notices.append(
                f"checkpoints have {size} of host memory, which is one copy of this rank's share: a save waits until "
                "the one before is written; raise training.checkpoint.hostMemoryBytes"
            )
        if self._lacks_pin:
            notices.append(f"the {size} of host memory for checkpoints could not be page-locked: copies are slower")
        return notices

    def window_bytes(self, file_bytes: int) -> int:
        """How much of a file of this size a slab holds at a time: byte i is at i modulo this.

        ValueError when the file has outgrown the slabs and not even a part fits.
        """
        slab_bytes = self.plan.slab_bytes
        window = slab_bytes if file_bytes <= slab_bytes else slab_bytes // self.part_bytes * self.part_bytes
        if window == 0:
            raise ValueError(f"a checkpoint file grew to {file_bytes} bytes; memory was taken for {slab_bytes}")
        return window

    @property
    def has_free(self) -> bool:
        return bool(self._free)

    def take(self) -> Slab | None:
        """A slab that nobody uses; None while there is none."""
        try:
            return self._free.popleft()
        except IndexError:
            return None

    def give_back(self, slab: Slab) -> None:
        """Its bytes are needed no more."""
        self._free.append(slab)

    def close(self) -> None:
        """Give the memory back. Nothing may be copying any more."""
        self._free.clear()
        self.arena.close()


def default_budget_bytes(local_ranks: int) -> int:
    """A rank's share of a quarter of the memory that this container may use."""
    return memory_limit_bytes() // _SHARE_OF_MEMORY // local_ranks


def memory_limit_bytes() -> int:
    """The container's memory limit (cgroup v2, else v1), or the machine's memory where there is none."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in _MEMORY_LIMITS:
        with suppress(OSError, ValueError):  # no such file; "max"
            limits.append(int(file.read_text()))
    return min(limits)


def page_lock(memory: torch.Tensor) -> bool:
    """Page-lock host memory for all CUDA devices; False when the driver refuses.

    It stays locked until cudaHostUnregister, which must come before the memory goes.
    """
    code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), _HOST_REGISTER_PORTABLE)
    if int(code) == 0:
        return True
    # The runtime keeps the failure for whoever asks next, which is the check after the next kernel launch.
    with suppress(RuntimeError):
        torch.ones(1, device="cuda").neg_()
    return False


def _open_memory(size_bytes: int) -> int:
    """A file of this size that lives in memory and has no name."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("pylon-checkpoint")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    try:
        os.ftruncate(fd, size_bytes)
    except OSError:
        os.close(fd)
        raise
    return fd
