"""The compressed exchange over real gloo ranks: bytes, sums, what is kept, numbers that are not finite, restarts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from transport import count_bytes

from pylon_api.training import ConsensusSpec
from pylon_trainer.consensus import divide_up
from pylon_trainer.consensus.compressed import CALIBRATION_STEPS, CompressedExchange
from pylon_trainer.consensus.groups import Kind
from pylon_trainer.errors import ConfigError
from pylon_trainer.runtime.distributed import World

SHAPES = {
    "embedding.weight": (41, 24),
    "blocks.0.mixer.weight": (33, 70),
    "blocks.0.mixer.bias": (33,),
    "blocks.0.codebook": (50, 12),
    "blocks.0.empty": (0, 4),
    "norm.weight": (),
    "output.weight": (41, 24),
}
EVERY_CODEC: list[dict[str, Any]] = [
    {"codec": "Int8"},
    {"codec": "Int4"},
    {"codec": "Int4", "every_steps": 3},
    {"codec": "Sign"},
    {"codec": "Dct"},
    {"codec": "Sketch"},
    {"codec": "SparseRows", "bytes_per_step": 9000},
    {"codec": "Auto", "bytes_per_step": 7000},
]


def name_of(fields: dict[str, Any]) -> str:
    return " ".join(map(str, fields.values()))


every_codec = pytest.mark.parametrize("fields", EVERY_CODEC, ids=name_of)


def exchange_of(world: World, fields: dict[str, Any]) -> CompressedExchange:
    return CompressedExchange(world, ConsensusSpec.model_validate(fields), SHAPES, seed=5)


def gradients(rank: int, step: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Different on each rank and in each step; in the embedding only a few rows."""
    draw = torch.Generator().manual_seed(1000 * rank + step)
    found = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in SHAPES.items()}
    found["embedding.weight"][torch.randperm(41, generator=draw)[4:]] = 0
    return found


def total_of(named: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in named.values()])


def assert_alike(world: World, named: dict[str, Tensor]) -> None:
    """Bit for bit."""
    own = torch.cat([tensor.float().flatten() for tensor in named.values()]).view(torch.int32)
    assert torch.equal(world.all_gather(own), own.expand(world.size, -1))


@pytest.mark.parametrize("size", [2, 4])
def test_counted_bytes_are_those_handed_to_the_transport_and_within_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    counted_bytes = count_bytes(monkeypatch, size)

    def take_part(world: World) -> None:
        for fields in EVERY_CODEC:
            exchange = exchange_of(world, fields)
            for step in range(CALIBRATION_STEPS + 2):
                before, before_counted = world.traffic.bytes, counted_bytes()
                exchange.exchange(gradients(world.rank, step))
                step_bytes = world.traffic.bytes - before
                assert step_bytes == counted_bytes() - before_counted, fields
                assert step_bytes <= fields.get("bytes_per_step", 2_000_000), fields
            flag_bytes = 2 * 4 * (size - 1) // size
            if "SparseRows" in exchange.channels[Kind.EMBEDDING]:  # ranks may name the same rows
                assert step_bytes <= exchange.bytes_per_step + flag_bytes, fields
            else:
                assert step_bytes == exchange.bytes_per_step + flag_bytes, fields
            assert world.traffic.sent_bytes == world.traffic.received_bytes

    run_ranks(take_part, tmp_path, size)


@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_get_the_same_and_in_the_long_run_the_sum(tmp_path: Path, size: int) -> None:
    """Of integers: what has come through, with what is kept on all ranks, is all that ever went in."""

    def take_part(world: World) -> None:
        for fields in EVERY_CODEC:
            if fields["codec"] in ("Dct", "Sketch"):
                continue
            exchange = exchange_of(world, fields)
            through, put_in = torch.zeros(()), torch.zeros(())
            for step in range(12):
                put_in = put_in + sum(total_of(gradients(rank, step)) for rank in range(size))
                own = gradients(world.rank, step)
                exchange.exchange(own)
                assert_alike(world, own)
                through = through + total_of(own)
            assert torch.cosine_similarity(through, put_in, dim=0) > 0.6, fields
            if fields["codec"] in ("Int8", "Int4"):
                kept = [state["kept"] for state in exchange.state_dict()["channels"].values()]
                left = world.sum(torch.cat(kept).double().sum())
                assert float(through.sum() + left) == pytest.approx(float(put_in.sum()), abs=0.05), fields

    run_ranks(take_part, tmp_path, size)


def test_gradients_in_bfloat16_keep_their_type_and_are_summed_in_float32(tmp_path: Path) -> None:
    def take_part(world: World) -> None:
        own = gradients(world.rank, 0, torch.bfloat16)
        expected = {name: sum(gradients(r, 0, torch.bfloat16)[name].float() for r in range(4)) for name in SHAPES}
        exchange_of(world, {"codec": "Int8"}).exchange(own)
        assert_alike(world, own)
        for name, tensor in own.items():
            assert tensor.dtype == torch.bfloat16
            assert torch.allclose(tensor.float(), expected[name], atol=0.15), name

    run_ranks(take_part, tmp_path, 4)


@pytest.mark.parametrize(
    ("fields", "rows", "with_feedback", "without"),
    [
        ({"codec": "Int4"}, 64, 0.02, 0.08),
        ({"codec": "Sign"}, 64, 0.05, 0.2),
        ({"codec": "Dct"}, 64, 0.05, 0.5),
        ({"codec": "Sketch", "bytes_per_step": 12_000}, 2, 0.05, 0.0),  # its state is its feedback; for heavy values
        ({"codec": "SparseRows", "bytes_per_step": 5_400}, 64, 0.02, 0.2),
    ],
    ids=["Int4", "Sign", "Dct", "Sketch", "SparseRows"],
)
def test_error_feedback_reaches_the_optimum_of_a_quadratic(
    tmp_path: Path, fields: dict[str, Any], rows: int, with_feedback: float, without: float
) -> None:
    """Ranks pull to places of their own; the optimum is the mean of these, where no rank's own gradient is zero."""
    shapes = {"embedding.weight": (64, 16)}

    def distance(world: World, spec: ConsensusSpec) -> float:
        draw = torch.Generator().manual_seed(0)
        is_pulled = (torch.arange(64) < rows).float()[:, None]
        places = [torch.randn(64, 16, generator=draw) * is_pulled for _ in range(world.size)]
        optimum = sum(places) / world.size
        exchange = CompressedExchange(world, spec, shapes, seed=5)
        x = torch.zeros(64, 16)
        for step in range(300):
            pull = {"embedding.weight": (x - places[world.rank]) / world.size}
            exchange.exchange(pull)
            x -= 0.05 * 0.05 ** max(0.0, step / 150 - 1) * pull["embedding.weight"]
        return float((x - optimum).norm() / optimum.norm())

    def take_part(world: World) -> None:
        spec = ConsensusSpec.model_validate(fields)
        reached = distance(world, spec)
        assert reached < with_feedback
        if without:
            assert distance(world, spec.model_copy(update={"error_feedback": False})) > without

    run_ranks(take_part, tmp_path, 2)


@every_codec
def test_a_gradient_that_is_not_finite_on_one_rank_costs_all_this_step_and_nothing_else(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    def take_part(world: World) -> None:
        spoiled, clean = exchange_of(world, fields), exchange_of(world, fields)
        for step in range(CALIBRATION_STEPS + 1):
            for exchange in (spoiled, clean):
                exchange.exchange(gradients(world.rank, step))
        before = copy.deepcopy(spoiled.state_dict()["channels"])
        own = gradients(world.rank, 99)
        if world.rank == 1:
            own["blocks.0.mixer.weight"][0, 0] = float("nan" if fields["codec"] != "Int8" else "inf")
        spoiled.exchange(own)
        assert all(tensor.isnan().all() for tensor in own.values())
        after = spoiled.state_dict()["channels"]
        for kind, state in before.items():
            for key, value in state.items():
                assert key == "turn" or torch.equal(value, after[kind][key]), (kind, key)

    run_ranks(take_part, tmp_path, 2)


@every_codec
def test_an_exchange_goes_on_from_its_state_bit_for_bit(tmp_path: Path, fields: dict[str, Any]) -> None:
    def take_part(world: World) -> None:
        first = exchange_of(world, fields)
        for step in range(6):
            first.exchange(gradients(world.rank, step))
        second = exchange_of(world, fields)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        for step in range(6, 9):
            one, other = gradients(world.rank, step), gradients(world.rank, step)
            first.exchange(one)
            second.exchange(other)
            assert torch.equal(total_of(one), total_of(other))

    run_ranks(take_part, tmp_path, 2)


def test_on_another_number_of_ranks_all_that_was_kept_is_kept(tmp_path: Path) -> None:
    fields = {"codec": "Int4", "every_steps": 3}
    saved = tmp_path / "saved"
    saved.mkdir()

    def save(world: World) -> None:
        exchange = exchange_of(world, fields)
        for step in range(4):
            exchange.exchange(gradients(world.rank, step))
        torch.save(exchange.state_dict(), saved / f"{world.rank}.pt")

    def load(world: World) -> None:
        states = [torch.load(saved / f"{rank}.pt") for rank in range(4)]
        exchange = exchange_of(world, fields)
        exchange.load_state_dict(divide_up(states, world.size))
        for kind, state in exchange.state_dict()["channels"].items():
            if "kept" in state:
                before = sum(old["channels"][kind]["kept"] for old in states)
                assert torch.allclose(world.sum(state["kept"].clone()), before, atol=1e-5)
                assert_alike(world, {"kept": state["kept"]})

    (tmp_path / "four").mkdir()
    (tmp_path / "two").mkdir()
    run_ranks(save, tmp_path / "four", 4)
    run_ranks(load, tmp_path / "two", 2)


def test_without_feedback_nothing_is_kept(tmp_path: Path) -> None:
    def take_part(world: World) -> None:
        exchange = exchange_of(world, {"codec": "Int4", "error_feedback": False})
        once, again = gradients(world.rank, 0), gradients(world.rank, 0)
        exchange.exchange(once)
        exchange.exchange(again)
        assert torch.equal(total_of(once), total_of(again))

    run_ranks(take_part, tmp_path, 2)


def test_a_budget_below_the_least_possible_names_it(tmp_path: Path) -> None:
    def take_part(world: World) -> None:
        with pytest.raises(ConfigError, match=r"bytesPerStep 4100.*least possible is (\d+) bytes") as refusal:
            exchange_of(world, {"codec": "Int8", "bytes_per_step": 4100})
        least_bytes = int(str(refusal.value).split("least possible is ")[1].split()[0])
        exchange_of(world, {"codec": "Int8", "bytes_per_step": least_bytes})
        with pytest.raises(ConfigError):
            exchange_of(world, {"codec": "Int8", "bytes_per_step": least_bytes - 1})

    run_ranks(take_part, tmp_path, 2)
