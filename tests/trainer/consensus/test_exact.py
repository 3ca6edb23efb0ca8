"""The exact exchange against a plain sum and against DistributedDataParallel, over real gloo ranks."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from pylon_trainer.consensus.exact import ExactExchange
from pylon_trainer.runtime.distributed import World

SHAPES = {"a": (3, 5), "b": (7,), "c": (2, 2, 2), "d": ()}


def gradients(rank: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(rank)
    return {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("bucket_bytes", [1, 64, 2**20], ids=lambda size: f"buckets of {size}")
@pytest.mark.parametrize("size", [1, 3])
def test_every_rank_holds_the_sum_and_counts_what_a_ring_moves(tmp_path: Path, size: int, bucket_bytes: int) -> None:
    def take_part(world: World) -> None:
        own = gradients(world.rank)
        places = {name: gradient.data_ptr() for name, gradient in own.items()}
        ExactExchange(world, bucket_bytes).exchange(own)
        for name, summed in own.items():
            expected = torch.stack([gradients(peer)[name] for peer in range(size)]).sum(0)
            assert torch.allclose(summed, expected)
            assert summed.data_ptr() == places[name]
        total_bytes = 4 * (15 + 7 + 8 + 1)
        assert world.traffic.bytes == pytest.approx(2 * total_bytes * (size - 1) / size, abs=4)  # a byte to a bucket

    run_ranks(take_part, tmp_path, size)


def test_two_ranks_get_the_gradients_of_distributed_data_parallel_bit_for_bit(tmp_path: Path) -> None:
    """With two ranks neither the order of the sum nor halving can round differently."""
    importlib.import_module("torch._dynamo")  # DistributedDataParallel needs it: once here instead of in every rank

    def take_part(world: World) -> None:
        torch.manual_seed(0)
        ours = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
        theirs = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(ours))
        inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(world.rank))
        theirs(inputs).square().sum().backward()  # averaged over the ranks
        (ours(inputs).square().sum() / world.size).backward()
        ExactExchange(world).exchange({name: p.grad for name, p in ours.named_parameters() if p.grad is not None})
        for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert own.grad is not None
            assert torch.equal(own.grad, other.grad)

    run_ranks(take_part, tmp_path, size=2)
