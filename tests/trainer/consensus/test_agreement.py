"""Ranks that should be alike and are not: named at the start, healed or stopped while training."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gangs import run_pod, start_gang
from ranks import run_ranks

from pylon_api.names import ExitCode
from pylon_api.run import RunConfig
from pylon_api.training import Disagreement
from pylon_trainer import worker
from pylon_trainer.consensus import agreement
from pylon_trainer.consensus.agreement import Agreement, fingerprints, refuse_disagreement
from pylon_trainer.errors import ConfigError, PeerLost
from pylon_trainer.run import Run
from pylon_trainer.runtime.distributed import World

MakeConfig = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8], ids=str)
def test_any_bit_changes_the_fingerprint(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "CHUNK_VALUES", 4)
    tensor = torch.arange(21).reshape(3, 7).to(dtype)
    tensor_bytes = tensor.view(torch.uint8).view(-1)
    original = int(fingerprints([tensor])[0])
    seen = []
    for bit in range(8 * tensor.nbytes):
        tensor_bytes[bit // 8] ^= 1 << bit % 8
        seen.append(int(fingerprints([tensor])[0]))
        tensor_bytes[bit // 8] ^= 1 << bit % 8
    assert original not in seen
    assert len(set(seen)) > 0.99 * len(seen), "two changes are hardly ever taken for each other"
    assert int(fingerprints([tensor.T.contiguous().T])[0]) == original
    assert fingerprints([torch.empty(0), torch.tensor(1.5)]).shape == (2,)


def test_values_that_change_places_change_the_fingerprint() -> None:
    one, other = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 1.0, 3.0])
    assert not torch.equal(fingerprints([one]), fingerprints([other]))


def test_replicas_that_differ_are_given_those_of_rank_0(tmp_path: Path) -> None:
    def take_part(world: World) -> None:
        tensors = {"a": torch.ones(5), "b": torch.arange(12.0).view(3, 4).T, "c": torch.zeros(())}
        watch = Agreement(world, tensors, Disagreement.HEAL)
        assert watch.check() is None
        if world.rank == 2:
            tensors["b"][1, 2] += 1e-6
        assert watch.check() == (
            "replicas disagreed: rank 2 and the others differed in 1 of 3 tensors (b); all go on with rank 0's"
        )
        assert torch.equal(tensors["b"], torch.arange(12.0).view(3, 4).T)
        assert watch.check() is None

    run_ranks(take_part, tmp_path, 4)


def test_replicas_that_differ_end_the_attempt_when_they_should(tmp_path: Path) -> None:
    def take_part(world: World) -> None:
        watch = Agreement(world, {"a": torch.full((5,), float(world.rank == 1))}, Disagreement.STOP)
        with pytest.raises(
            PeerLost, match=r"^replicas disagree: rank 1 and the others differed in 1 of 1 tensors \(a\);"
        ):
            watch.check()

    run_ranks(take_part, tmp_path, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 7}, "rank 1 and the others run different configurations: training.seed is 7 there and 0 "),
        ({"model": {"layers": 2}}, r"training\.model\.layers is 2 there and 1 elsewhere"),
    ],
)
def test_another_configuration_is_named(
    tmp_path: Path, make_config: MakeConfig, changes: dict[str, Any], message: str
) -> None:
    usual, other = (RunConfig.model_validate(make_config(**fields)) for fields in ({}, changes))

    def take_part(world: World) -> None:
        weights = {"a": torch.ones(3)}
        refuse_disagreement(world, usual, weights)
        with pytest.raises(ConfigError, match=message):
            refuse_disagreement(world, other if world.rank == 1 else usual, weights)

    run_ranks(take_part, tmp_path, 3)


def test_other_first_weights_are_named(tmp_path: Path, make_config: MakeConfig) -> None:
    config = RunConfig.model_validate(make_config())

    def take_part(world: World) -> None:
        with pytest.raises(ConfigError, match=r"^ranks 1, 2 and the others begin with different weights"):
            refuse_disagreement(world, config, {"a": torch.full((3,), float(world.rank in (1, 2)))})

    run_ranks(take_part, tmp_path, 5)


def test_pods_with_different_configurations_do_not_begin(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_config(path: Path) -> RunConfig:
        config = RunConfig.model_validate_json(path.read_bytes())
        seed = int(os.environ["RANK"])
        return config.model_copy(update={"training": config.training.model_copy(update={"seed": seed})})

    monkeypatch.setattr(worker, "read_config", read_config)
    pods = start_gang(tmp_path, make_config(nodes=2, processes=1))
    assert [pod.wait() for pod in pods] == [ExitCode.BAD_CONFIG] * 2
    assert "training.seed is 1 there and 0 elsewhere" in pods[0].report.message


@pytest.mark.parametrize("local_steps", [1, 3])
@pytest.mark.parametrize("on_disagreement", ["Heal", "Stop"])
def test_a_run_notices_a_replica_that_has_drifted(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, on_disagreement: str, local_steps: int
) -> None:
    advance = Run.advance

    def patched(run: Run, *arguments: Any) -> Any:
        update = advance(run, *arguments)
        if run.step == 3 and run.world.rank == 1:
            with torch.no_grad():
                next(iter({**run.parameters, **run.exchange.replicas}.values())).view(-1)[0] += 1e-3
        return update

    monkeypatch.setattr(Run, "advance", patched)
    consensus = {"hashCheckSteps": 2, "onDisagreement": on_disagreement, "localSteps": local_steps}
    exit_code, pod = run_pod(tmp_path, make_config(consensus=consensus))
    if on_disagreement == "Stop":
        assert exit_code == ExitCode.PEER_LOST
        assert pod.report.message.startswith("replicas disagree: rank 1 and the others differed in ")
        return
    assert (exit_code, pod.final.healed_replicas) == (0, 1), pod.log
    assert pod.final.notices[0].startswith("after step 4 replicas disagreed: rank 1 and the others differed in ")
