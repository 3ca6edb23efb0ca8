"""This process among its peers: rank, device and the few things that all ranks say to each other.

Small values travel over gloo on the CPU even when gradients travel over NCCL, so agreeing on a step never waits for
the device. A collective that breaks means that a peer is gone: it raises PeerLost, whatever the library called it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pylon_trainer.errors import ConfigError, PeerLost
from pylon_trainer.runtime.stalls import name_silent_ranks

T = TypeVar("T")


@contextmanager
def collective() -> Iterator[None]:
    """Turns the failure of a collective into PeerLost, which names the ranks that others waited for in vain."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # this rank's own device, whose errors surface anywhere
        raise
    except RuntimeError as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "timed out" in line.lower() and (silent := name_silent_ranks()):
            raise PeerLost(f"{silent} fell silent: {line}") from error
        raise PeerLost(f"a peer died or fell silent: {line}") from error


@dataclass(slots=True)
class Traffic:
    """Bytes between this rank and its peers since the process began: of every collective over tensors. Objects, which
    ranks pass around at the start and at checkpoints alone, are not counted."""

    sent_bytes: int = 0
    received_bytes: int = 0

    @property
    def bytes(self) -> int:
        """The larger of both: what a link that is as fast either way takes its time for."""
        return max(self.sent_bytes, self.received_bytes)

    def add(self, sent_bytes: int, received_bytes: int) -> None:
        """Count one collective."""
        self.sent_bytes += sent_bytes
        self.received_bytes += received_bytes


@dataclass(frozen=True, slots=True)
class World:
    """All ranks of the run, seen from one of them."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    traffic: Traffic = field(default_factory=Traffic, compare=False)

    def agree(self, *values: int) -> list[int]:
        """Sums of these integers over all ranks, the same on each. Does not touch the device."""
        return [int(value) for value in self.sum(torch.tensor(values, dtype=torch.int64)).tolist()]

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place, wherever the tensor lives."""
        self._reduce(tensor, dist.ReduceOp.SUM)
        return tensor

    def maximum(self, tensor: Tensor) -> Tensor:
        """Maximum over all ranks, in place, wherever the tensor lives."""
        self._reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def _reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
        with collective():
            dist.all_reduce(tensor, operation)
        # A ring all-reduce sends and receives 2 (n - 1) / n of a tensor (Patarasuk & Yuan 2009).
        ring_bytes = 2 * tensor.nbytes * (self.size - 1) // self.size
        self.traffic.add(ring_bytes, ring_bytes)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor, of one shape on all, stacked in the order of ranks."""
        stacked = tensor.new_empty(self.size, *tensor.shape)
        with collective():
            dist.all_gather_into_tensor(stacked.view(-1), tensor.contiguous().view(-1))
        peers_bytes = tensor.nbytes * (self.size - 1)
        self.traffic.add(peers_bytes, peers_bytes)
        return stacked

    def all_to_all(self, tensor: Tensor) -> Tensor:
        """Row r of every rank's tensor, which has a row for each rank r, stacked on rank r in the order of ranks."""
        received = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        with collective():
            dist.all_to_all_single(received, tensor.contiguous())
        peers_bytes = tensor.nbytes * (self.size - 1) // self.size
        self.traffic.add(peers_bytes, peers_bytes)
        return received

    def gather(self, value: T) -> list[T]:
        """Every rank's small value, in the order of ranks, on each."""
        values: list[Any] = [None] * self.size
        with collective():
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T, source: int = 0) -> T:
        """One rank's small value, on each."""
        values = [value]
        with collective():
            dist.broadcast_object_list(values, src=source, device=torch.device("cpu"))
        return values[0]

    def broadcast_tensor(self, tensor: Tensor, source: int) -> None:
        """One rank's values of a contiguous tensor, into that of each, wherever it lives."""
        with collective():
            dist.broadcast(tensor, src=source)
        is_source = self.rank == source
        self.traffic.add(tensor.nbytes * is_source, tensor.nbytes * (not is_source))

    def pass_tensor(self, tensor: Tensor, source: int, target: int) -> None:
        """One rank's values of a contiguous CPU tensor, into that of another. Nothing to do for the others, who may
        leave this out, nor where both are one."""
        if source == target or self.rank not in (source, target):
            return
        is_source = self.rank == source
        with collective():
            dist.send(tensor, target) if is_source else dist.recv(tensor, source)
        self.traffic.add(tensor.nbytes * is_source, tensor.nbytes * (not is_source))


def join_world(gpus_per_node: int, timeout_seconds: float) -> World:
    """Meet the other ranks that the launcher started. ConfigError when the GPUs asked for are not there.

    timeout_seconds: after this long in a collective, this one included, a silent peer counts as lost.
    """
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    device = _choose_device(gpus_per_node, local_rank)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, _cores() // local_size))
    with collective(), _rendezvous_port():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout_seconds),
            device_id=device if device.type == "cuda" else None,
        )
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device)


@contextmanager
def _rendezvous_port() -> Iterator[None]:
    """Rank 0 holds the rendezvous: a port that is taken is the machine's fault, no peer's."""
    try:
        yield
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ConfigError(
            f"port {os.environ['MASTER_PORT']} of the rendezvous is in use: end what listens there, "
            f"or set PET_MASTER_PORT to another"
        ) from error


def leave_world() -> None:
    """Close connections in order."""
    dist.destroy_process_group()


def _choose_device(gpus_per_node: int, local_rank: int) -> torch.device:
    if gpus_per_node == 0:
        return torch.device("cpu")
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if present < gpus_per_node:
        raise ConfigError(
            f"gpusPerNode {gpus_per_node}, but this machine shows {present} CUDA devices; "
            f"ask for fewer, or set gpusPerNode 0 to train on CPU"
        )
    if local_rank >= present:
        raise ConfigError(
            f"processesPerNode asks for a process {local_rank + 1} on {present} CUDA devices; "
            f"it must not exceed gpusPerNode"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _cores() -> int:
    """Cores this process may use: its affinity, cut to the container's CPU limit (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores
