"""Local steps over real gloo ranks: what is shared is alike, what is counted is what travels, and how runs go on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from transport import count_bytes

from pylon_api.training import ConsensusSpec
from pylon_trainer.consensus import divide_up
from pylon_trainer.consensus.compressed import CONTROL_BYTES
from pylon_trainer.consensus.local_steps import LocalSteps
from pylon_trainer.errors import ConfigError
from pylon_trainer.runtime.distributed import World

SHAPES = {"embedding.weight": (41, 24), "blocks.0.mixer.weight": (33, 70), "blocks.0.mixer.bias": (33,), "norm": (24,)}
LOCAL_STEPS = 4
EVERY_CODEC: list[dict[str, Any]] = [
    {"codec": "Exact"},
    {"codec": "Int8"},
    {"codec": "Int4"},
    {"codec": "Sign"},
    {"codec": "Dct", "outer_rate": 1.0, "outer_momentum": 0.0},
    {"codec": "Auto", "bytes_per_step": 6000},
]


def weights() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}


def exchange_of(world: World, parameters: dict[str, Tensor], **fields: Any) -> LocalSteps:
    spec = ConsensusSpec.model_validate({"local_steps": LOCAL_STEPS, **fields})
    return LocalSteps(world, spec, parameters)


def train(
    world: World, exchange: LocalSteps, parameters: dict[str, Tensor], steps: range, is_last: Callable[[int], bool]
) -> None:
    """Steps in which every rank goes its own way."""
    for step in steps:
        draw = torch.Generator().manual_seed(1000 * world.rank + step)
        for parameter in parameters.values():
            parameter -= 0.01 * torch.randn(parameter.shape, generator=draw)
        exchange.after_update(is_last=is_last(step))


def never(_step: int) -> bool:
    return False


def is_alike(world: World, tensors: dict[str, Tensor]) -> bool:
    """Whether all ranks have the same bits."""
    own = torch.cat([tensor.flatten() for tensor in tensors.values()]).view(torch.int32)
    return torch.equal(world.all_gather(own), own.expand(world.size, -1))


@pytest.mark.parametrize("size", [2, 3])
def test_shared_weights_are_alike_at_all_times_and_all_weights_at_the_end(tmp_path: Path, size: int) -> None:
    def take_part(world: World) -> None:
        for fields in EVERY_CODEC:
            parameters = weights()
            exchange = exchange_of(world, parameters, **fields)
            for step in range(10):
                train(world, exchange, parameters, range(step, step + 1), lambda step: step == 9)
                assert is_alike(world, exchange.replicas), fields
                assert is_alike(world, parameters) is (step == 9), fields
            assert all(torch.equal(exchange.replicas[name], parameters[name]) for name in SHAPES)

    run_ranks(take_part, tmp_path, size)


@pytest.mark.parametrize("size", [2, 3])
def test_counted_bytes_are_those_handed_to_the_transport_and_every_step_takes_the_same_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    counted_bytes = count_bytes(monkeypatch, size)

    def take_part(world: World) -> None:
        for fields in EVERY_CODEC:
            parameters = weights()
            exchange = exchange_of(world, parameters, **fields)
            step_bytes = []
            for step in range(2 * LOCAL_STEPS):
                before, before_counted = world.traffic.bytes, counted_bytes()
                exchange.exchange({name: torch.zeros_like(tensor) for name, tensor in parameters.items()})
                train(world, exchange, parameters, range(step, step + 1), never)
                step_bytes.append(world.traffic.bytes - before)
                assert step_bytes[-1] == counted_bytes() - before_counted, fields
            assert max(step_bytes) <= fields.get("bytes_per_step", 2_000_000) - CONTROL_BYTES / 2, fields
            assert max(step_bytes) == step_bytes[0], fields
            assert step_bytes[:LOCAL_STEPS] == step_bytes[LOCAL_STEPS:], fields

    run_ranks(take_part, tmp_path, size)


def test_with_rate_1_and_no_momentum_a_fragment_becomes_the_mean_of_all_ranks(tmp_path: Path) -> None:
    def take_part(world: World) -> None:
        parameters = {"norm": torch.zeros(8)}
        exchange = exchange_of(world, parameters, codec="Exact", outer_rate=1.0, outer_momentum=0.0)
        for step in range(LOCAL_STEPS):
            parameters["norm"] += world.rank + 1.0
            exchange.after_update(is_last=False)
            mean = (step + 1) * (1 + 2 + 3) / 3
            assert torch.equal(parameters["norm"][2 * step : 2 * step + 2], torch.full((2,), mean))

    run_ranks(take_part, tmp_path, 3)


def test_the_shared_weights_follow_the_mean_as_torch_does_with_nesterov_momentum(tmp_path: Path) -> None:
    rounds = 3
    expected = torch.nn.Parameter(torch.zeros(LOCAL_STEPS))
    outer = torch.optim.SGD([expected], lr=0.7, momentum=0.9, nesterov=True)
    for round in range(rounds):  # one value to a fragment, whose first turn comes after one step, two steps, ...
        steps = torch.full((LOCAL_STEPS,), LOCAL_STEPS) if round else torch.arange(LOCAL_STEPS) + 1
        expected.grad = -0.5 * steps
        outer.step()

    def take_part(world: World) -> None:
        parameters = {"matrix": torch.zeros(2, 2)}
        exchange = exchange_of(world, parameters, codec="Exact", outer_rate=0.7, outer_momentum=0.9)
        for _ in range(rounds * LOCAL_STEPS):
            parameters["matrix"] += world.rank
            exchange.after_update(is_last=False)
        torch.testing.assert_close(exchange.replicas["matrix"].view(-1), expected.detach())

    run_ranks(take_part, tmp_path, 2)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("codec", ["Int4", "Sign", "Dct"])
def test_what_a_codec_loses_arrives_later(tmp_path: Path, codec: str, size: int) -> None:
    """Ranks that stand still meet at their mean, however coarse the codec."""

    def take_part(world: World) -> None:
        errors = {}
        for keeps in (True, False):
            parameters = weights()
            exchange = exchange_of(world, parameters, codec=codec, error_feedback=keeps)
            mean = {name: tensor * (1 + (world.size - 1) / 2) for name, tensor in parameters.items()}
            for parameter in parameters.values():
                parameter *= 1 + world.rank
            for _ in range(16 * LOCAL_STEPS):
                exchange.after_update(is_last=False)
            gone = torch.cat([(exchange.replicas[name] - mean[name]).flatten() for name in SHAPES])
            errors[keeps] = float(gone.norm())
        assert errors[True] < errors[False] / 2

    run_ranks(take_part, tmp_path, size)


@pytest.mark.parametrize("codec", ["Int4", "Sign", "Dct"])
def test_what_a_codec_loses_stays_in_the_rank_s_own_weights(tmp_path: Path, codec: str) -> None:
    """The mean of the ranks' own weights is what it would be if nothing were encoded."""

    def take_part(world: World) -> None:
        parameters = weights()
        exchange = exchange_of(world, parameters, codec=codec)
        train(world, exchange, parameters, range(10), never)
        expected = weights()
        for step in range(10):
            for rank in range(world.size):
                draw = torch.Generator().manual_seed(1000 * rank + step)
                for tensor in expected.values():
                    tensor -= 0.01 * torch.randn(tensor.shape, generator=draw) / world.size
        for name, tensor in parameters.items():
            torch.testing.assert_close(world.sum(tensor.clone()) / world.size, expected[name], rtol=0, atol=1e-5)

    run_ranks(take_part, tmp_path, 2)


def test_a_gradient_that_is_not_finite_on_one_rank_leaves_none_finite_anywhere(tmp_path: Path) -> None:
    def take_part(world: World) -> None:
        parameters = weights()
        exchange = exchange_of(world, parameters, codec="Int4")
        gradients = {name: torch.ones_like(tensor) for name, tensor in parameters.items()}
        exchange.exchange(gradients)
        assert all((gradient == world.size).all() for gradient in gradients.values())
        gradients["norm"][3] = torch.inf if world.rank == 1 else 1
        exchange.exchange(gradients)
        assert all(gradient.isnan().all() for gradient in gradients.values())

    run_ranks(take_part, tmp_path, 2)


@pytest.mark.parametrize("fields", EVERY_CODEC, ids=lambda fields: fields["codec"])
def test_a_restart_goes_on_bit_for_bit(tmp_path: Path, fields: dict[str, Any]) -> None:
    def take_part(world: World) -> None:
        whole, parts = weights(), weights()
        exchange = exchange_of(world, whole, **fields)
        train(world, exchange, whole, range(9), never)
        first = exchange_of(world, parts, **fields)
        train(world, first, parts, range(6), never)
        state = copy.deepcopy(first.state_dict())
        saved = {name: (first.replicas[name].clone(), tensor.clone()) for name, tensor in parts.items()}
        resumed = weights()
        second = exchange_of(world, resumed, **fields)
        for name, (shared, _) in saved.items():
            second.replicas[name].copy_(shared)
        second.load_state_dict(state)
        for name, (shared, own) in saved.items():
            assert torch.equal(resumed[name], shared)
            resumed[name].copy_(own)
        train(world, second, resumed, range(6, 9), never)
        assert all(torch.equal(resumed[name], whole[name]) for name in SHAPES)
        assert all(torch.equal(tensor, exchange.replicas[name]) for name, tensor in second.replicas.items())

    run_ranks(take_part, tmp_path, 2)


def test_another_number_of_ranks_goes_on_from_the_shared_weights(tmp_path: Path) -> None:
    """What one of three ranks owed of its part concerns other values than one of four ranks' part."""
    saved = tmp_path / "saved"
    saved.mkdir()

    def save(world: World) -> None:
        parameters = weights()
        exchange = exchange_of(world, parameters, codec="Sign", outer_momentum=0.5)
        train(world, exchange, parameters, range(9), never)
        torch.save((exchange.state_dict(), dict(exchange.replicas)), saved / f"{world.rank}.pt")

    def load(world: World) -> None:
        states, shared = zip(*(torch.load(saved / f"{rank}.pt") for rank in range(3)), strict=True)
        parameters = weights()
        exchange = exchange_of(world, parameters, codec="Sign", outer_momentum=0.5)
        for name in SHAPES:
            exchange.replicas[name].copy_(shared[0][name])
        assert states[0]["parts"]["matrices"]["owed"].any()
        exchange.load_state_dict(divide_up(states, world.size))
        assert not exchange.state_dict()["parts"]["matrices"]["owed"].any()
        assert all(torch.equal(parameters[name], shared[0][name]) for name in SHAPES)
        assert all(torch.equal(tensor, shared[0][name]) for name, tensor in exchange.replicas.items())
        for step in range(9, 14):
            train(world, exchange, parameters, range(step, step + 1), never)
            assert is_alike(world, exchange.replicas)

    for ranks, take_part in ((3, save), (4, load)):
        (tmp_path / str(ranks)).mkdir()
        run_ranks(take_part, tmp_path / str(ranks), ranks)


def test_a_budget_that_is_too_small_is_refused_with_the_least_possible(tmp_path: Path) -> None:
    def take_part(world: World) -> None:
        with pytest.raises(ConfigError, match="bytesPerStep 100 is too small: the least possible with localSteps 4"):
            exchange_of(world, weights(), codec="Auto", bytes_per_step=100)

    run_ranks(take_part, tmp_path, 2)
