"""What passes between ranks in the benchmark of exchanges: counted, and repeated alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch.distributed as dist
from measure import Mark
from torch import Tensor

from pylon_trainer.runtime.distributed import World

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
