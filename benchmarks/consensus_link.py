"""What passes between ranks in the benchmark of exchanges: counted, repeated alone, and extended to more ranks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import Mark, write_results
from torch import Tensor

from pylon_trainer.runtime.distributed import World

PROJECTED_RANKS = (8, 64, 1024)
REPEATS = 20


@dataclass(frozen=True)
class RecordingWorld(World):
    """Notes what collectives of a step are called with, so that they can be repeated alone."""

    calls: list[Callable[[], object]] = field(default_factory=list)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """See World."""
        self.calls.append(partial(World.all_gather, self, tensor))
        return super().all_gather(tensor)

    def all_to_all(self, tensor: Tensor) -> Tensor:
        """See World."""
        self.calls.append(partial(World.all_to_all, self, tensor))
        return super().all_to_all(tensor)

    def _reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
        if tensor.device == self.device:  # what the host says over gloo goes on beside the device's work
            self.calls.append(partial(World._reduce, self, tensor, operation))
        super()._reduce(tensor, operation)


class Transport:
    """Counts the bytes that a rank hands to torch.distributed for its peers, by what each collective sends."""

    def __init__(self, ranks: int) -> None:
        self.sent_bytes = 0
        gather, exchange, reduce = dist.all_gather_into_tensor, dist.all_to_all_single, dist.all_reduce

        def counting_gather(output: Tensor, own: Tensor) -> None:
            self.sent_bytes += output.nbytes - own.nbytes
            gather(output, own)

        def counting_exchange(output: Tensor, own: Tensor) -> None:
            self.sent_bytes += sum(part.nbytes for part in own.chunk(ranks)[1:])
            exchange(output, own)

        def counting_reduce(tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
            self.sent_bytes += 2 * tensor.nbytes * (ranks - 1) // ranks
            reduce(tensor, operation)

        dist.all_gather_into_tensor, dist.all_to_all_single, dist.all_reduce = (
            counting_gather,
            counting_exchange,
            counting_reduce,
        )


def alone_ms(world: World, calls: Sequence[Callable[[], object]]) -> float:
    """Median time of these calls, one after the other, with all ranks beginning together. Collective."""
    times_ms = []
    for _ in range(REPEATS):
        dist.barrier()
        begin = Mark(world.device)
        for call in calls:
            call()
        end = Mark(world.device)
        end.wait()
        times_ms.append(begin.milliseconds_to(end))
    return statistics.median(times_ms)


def fit_link(world: World) -> tuple[float, float]:
    """Seconds of a hop and of a byte: a line through the times of all-gathers of few and of many bytes."""
    points = []
    for size_bytes in (2**10, 2**25 if world.device.type == "cuda" else 2**21):
        own = torch.zeros(size_bytes, dtype=torch.uint8, device=world.device)
        points.append((size_bytes * (world.size - 1), alone_ms(world, [partial(world.all_gather, own)]) / 1e3))
    (few_bytes, few_s), (many_bytes, many_s) = points
    beta_s = (many_s - few_s) / (many_bytes - few_bytes)
    return max(0.0, few_s - beta_s * few_bytes) / (world.size - 1), beta_s


def project(rows: list[dict[str, Any]], alpha_s: float, beta_s: float, directory: Path) -> None:
    """What collectives would take on more ranks, by arithmetic: two for each channel, n - 1 hops in each.

    Of the first seed's runs; `of_step_now` is a share of the step measured on the ranks there are.
    """
    projected = []
    for row in (row for row in rows if row["seed"] == rows[0]["seed"]):
        collectives = 2 * len(row["channels"].split(", "))
        for ranks in PROJECTED_RANKS:
            moved_bytes = row["bytes_per_step_mean"] * _share(ranks) / _share(row["ranks"])
            seconds = collectives * alpha_s * (ranks - 1) + beta_s * moved_bytes
            projected.append(
                {
                    "projection": True,
                    "codec": row["codec"],
                    "local_steps": row["local_steps"],
                    "parameters": row["parameters"],
                    "ranks": ranks,
                    "bytes_per_step": int(moved_bytes),
                    "communication_ms": seconds * 1e3,
                    "of_step_now": seconds * 1e3 / row["step_ms"],
                    "alpha_us": alpha_s * 1e6,
                    "gigabytes_per_s": 1e-9 / beta_s,
                }
            )
    write_results("consensus_projection", projected, directory, note="arithmetic from measured bytes, not measured")


def _share(ranks: int) -> float:
    """Bytes of a rank, in payloads: exchanges between two ranks move one payload, among n 2 (n - 1) / n."""
    return 2 * (ranks - 1) / ranks
