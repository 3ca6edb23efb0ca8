"""The exact exchange against a plain sum, over real gloo ranks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gangs import fork, wait

from pylon_trainer.consensus.exact import ExactExchange
from pylon_trainer.runtime.distributed import World

SHAPES = {"a": (3, 5), "b": (7,), "c": (2, 2, 2), "d": ()}


def gradients(rank: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(rank)
    return {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("bucket_bytes", [1, 64, 2**20], ids=lambda size: f"buckets of {size}")
@pytest.mark.parametrize("size", [1, 3])
def test_every_rank_holds_the_sum_and_counts_what_a_ring_moves(tmp_path: Path, size: int, bucket_bytes: int) -> None:
    def take_part(rank: int) -> None:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=size)
        world = World(rank, size, rank, torch.device("cpu"))
        own = gradients(rank)
        places = {name: gradient.data_ptr() for name, gradient in own.items()}
        exchanged_bytes = ExactExchange(world, bucket_bytes).exchange(own)
        for name, summed in own.items():
            expected = torch.stack([gradients(peer)[name] for peer in range(size)]).sum(0)
            assert torch.allclose(summed, expected)
            assert summed.data_ptr() == places[name]
        total_bytes = 4 * (15 + 7 + 8 + 1)
        assert exchanged_bytes == 2 * total_bytes * (size - 1) // size
        dist.barrier()
        os._exit(0)

    children = [fork(lambda rank=rank: take_part(rank)) for rank in range(size)]
    assert [wait(child) for child in children] == [0] * size
