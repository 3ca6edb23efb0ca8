"""Ranks of a gloo world for tests, forked from the test's process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from gangs import fork, wait

from pylon_trainer.runtime.distributed import World


def run_ranks(take_part: Callable[[World], None], directory: Path, size: int) -> None:
    """Have every rank of a gloo world take part, each in a process of its own."""

    def rank_of(rank: int) -> None:
        dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=size)
        take_part(World(rank, size, rank, torch.device("cpu")))
        dist.barrier()
        os._exit(0)

    children = [fork(lambda rank=rank: rank_of(rank)) for rank in range(size)]
    assert [wait(child) for child in children] == [0] * size
