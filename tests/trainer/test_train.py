"""Runs of two ranks from start to end: results, resuming, stopping, numbers that go wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from gangs import Pod, run_gang, run_pod, save_at_once

from pylon_api import names
from pylon_api.names import ExitCode
from pylon_api.run import GateDecision, TrainerPhase
from pylon_trainer.consensus.compressed import CompressedExchange
from pylon_trainer.gating import gate, measurement
from pylon_trainer.gating.step import PlainStep
from pylon_trainer.run import Run
from pylon_trainer.runtime.signals import StopFlag
from pylon_trainer.step import Batch, StepResult

MakeConfig = Callable[..., dict[str, Any]]

SIZES = {"headWidth": 8, "stateSize": 8, "chunkTokens": 4, "attentionEvery": 0}
PLAIN = {"architecture": "Resonate", "resonate": SIZES}
ADAPTED = {
    "architecture": "Resonate",
    "resonate": {
        **SIZES,
        "adaptation": {
            "rank": 2,
            "maximumRank": 8,
            "growEverySteps": 3,
            "codebook": {"subKeys": 8, "width": 8, "reviveEverySteps": 3},
        },
    },
}
"""Ranks grow and sub-keys are looked at within a short run."""
THAWING = {
    "architecture": "Resonate",
    "resonate": {
        **SIZES,
        "adaptation": {"base": "Dense", "rank": 2, "maximumRank": 8, "unfreezeStep": 2, "baseSyncSteps": 2},
    },
}
"""The base learns from the third step on and moves after the fourth, sixth and eighth."""


def with_control(model: dict[str, Any]) -> dict[str, Any]:
    """The same model, and a controller that advises it."""
    return {**model, "resonate": {**model["resonate"], "control": {"vectorSize": 16, "outerEverySteps": 8}}}


def tuned_from(base: Path, place: Path, steps: int, **adaptation: Any) -> dict[str, Any]:
    """Fields of a run that saves in `place` and adapts the plain model whose checkpoints are in `base`."""
    own = {**SIZES, "adaptation": {"base": "Dense", "rank": 2, "growEverySteps": 0, **adaptation}}
    return {
        "model": {**PLAIN, "resonate": own},
        "checkpoint": {"uri": str(place), "restoreFrom": {"uri": str(base)}},
        "schedule": {"steps": steps},
    }


def before_step(monkeypatch: pytest.MonkeyPatch, step: int, rank: int, act: Callable[[], object]) -> None:
    """Have one rank do something just before its part of a step (from 1), while its peers go on."""
    advance = Run.advance

    def patched(run: Run, *arguments: Any) -> Any:
        if run.step + 1 == step and run.world.rank == rank:
            act()
        return advance(run, *arguments)

    monkeypatch.setattr(Run, "advance", patched)


def stop_pod_in_step(monkeypatch: pytest.MonkeyPatch, step: int, rank: int) -> None:
    """Send SIGTERM to the launcher while a step is in progress, so that all agree on it in the next one."""
    flags: list[StopFlag] = []
    begin = StopFlag.__init__

    def patched(self: StopFlag, at_once: Callable[[str], object]) -> None:
        begin(self, at_once)
        flags.append(self)

    def act() -> None:
        os.kill(os.getppid(), signal.SIGTERM)
        while not flags[-1].is_set():
            time.sleep(0.01)

    monkeypatch.setattr(StopFlag, "__init__", patched)
    before_step(monkeypatch, step, rank, act)


def committed_steps(checkpoints: Path) -> list[int]:
    return sorted(int(marker.parent.name.split("-")[1]) for marker in checkpoints.glob("step-*/COMMITTED"))


def newest(checkpoints: Path, step: int | None = None) -> dict[str, bytes]:
    """The ranks' files of the newest checkpoint, or that of a step: weights, moments, generators."""
    marker = max(checkpoints.glob("step-*/COMMITTED" if step is None else f"step-{step:012}-*/COMMITTED"))
    return {path.name: path.read_bytes() for path in marker.parent.glob("rank-*.safetensors")}


def weights(checkpoints: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """All tensors that all ranks have alike in the newest checkpoint, or that of a step, by name."""
    tensors = [safetensors.torch.load(data) for data in newest(checkpoints, step).values()]
    return {name: tensor for part in tensors for name, tensor in part.items() if not name.startswith("own/")}


@pytest.fixture
def plain_pod(tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> Pod:
    """A run of the plain model that has ended, and left its weights in `checkpoints`."""
    save_at_once(monkeypatch)
    exit_code, pod = run_pod(tmp_path / "plain", make_config(model=PLAIN))
    assert exit_code == 0, pod.log
    return pod


def test_a_run_trains_evaluates_saves_samples_and_exports(
    tmp_path: Path, make_config: MakeConfig, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_at_once(monkeypatch)
    config = make_config(
        schedule={"steps": 30},
        evaluation={"samplePrompt": "Document ", "sampleTokens": 5},
        export={"format": "HuggingFace"},
    )
    exit_code, pod = run_pod(tmp_path, config)
    final = pod.final
    assert (exit_code, final.phase, final.step, final.total_steps) == (0, TrainerPhase.FINISHED, 30, 30), pod.log
    assert final.tokens == 30 * 4 * 16
    losses = {step: float(loss) for step, loss in pod.values("loss").items()}
    assert sorted(losses) == list(range(1, 31))
    assert losses[30] < losses[1] - 1
    assert final.loss == pytest.approx(losses[30], abs=1e-6)
    assert final.held_out_loss == pytest.approx(float(pod.values("held_out_loss")[30]), abs=1e-6)
    assert final.checkpoint is not None
    assert final.checkpoint.step == 30
    assert committed_steps(checkpoints) == [27, 30]
    assert final.sample is not None
    assert final.sample.startswith("Document ")
    assert final.export_uri == f"{checkpoints}/export"
    assert (checkpoints / "export" / "config.json").is_file()
    first_line = pod.log.splitlines()[0]
    assert re.fullmatch(r"step=1 loss=\S+ tokens_per_second=\d+ learning_rate=5.000e-03 gradient_norm=\S+", first_line)


@pytest.mark.parametrize(
    ("gating", "activation"),
    [
        ({}, "Silu"),
        ({"engine": "SinglePass"}, "Binlop"),
        ({"engine": "TwoPass", "rowActivations": "Recompute", "depthBuckets": 2}, "Binlop"),
        ({"granularity": "Sequence"}, "Silu"),
    ],
)
def test_resonate_trains_with_every_gate(
    gating: dict[str, Any], activation: str, tmp_path: Path, make_config: MakeConfig
) -> None:
    own = {**SIZES, "attentionEvery": 4, "longConvolutionEvery": 4, "activation": activation}
    fixed = {"strategy": "GradientNorm", "ratioControl": "Fixed", "tokenRatio": 0.5} | gating
    exit_code, pod = run_pod(
        tmp_path,
        make_config(
            model={"architecture": "Resonate", "layers": 4, "resonate": own},
            data={"packing": "Isolated"},
            schedule={"steps": 30},
            gating=fixed if gating else {},
            evaluation={"samplePrompt": "Document ", "sampleTokens": 5},
        ),
    )
    assert exit_code == 0, pod.log
    losses = {step: float(loss) for step, loss in pod.values("loss").items()}
    assert losses[30] < losses[1] - 0.5
    assert pod.final.sample is not None
    assert pod.final.sample.startswith("Document ")


def test_a_plain_checkpoint_becomes_the_frozen_base_of_an_adapted_model(
    plain_pod: Pod, tmp_path: Path, make_config: MakeConfig, checkpoints: Path
) -> None:
    before = weights(checkpoints)
    tuned = tuned_from(checkpoints, tmp_path / "tuned", steps=12, codebook={"width": 8})
    exit_code, second = run_pod(tmp_path / "tuned", make_config(**tuned))
    assert exit_code == 0, second.log
    assert min(second.values("loss")) == 1
    assert float(second.values("loss")[1]) == pytest.approx(float(plain_pod.values("loss")[8]), abs=0.3)
    assert any("begins at step 0 with the weights of" in notice for notice in second.final.notices)
    after = weights(tmp_path / "tuned" / "default" / "demo-12345678")
    frozen = {f"model/blocks.0.{path}.weight" for path in ("mixer.input", "mixer.output", "mlp.gate", "mlp.down")}
    for name in frozen:
        assert torch.equal(before[name], after[name]), name
    assert not torch.equal(before["model/norm.weight"], after["model/norm.weight"])
    assert not any(f"optimizer/first_moments/{name.removeprefix('model/')}" in after for name in frozen)

    other = tuned_from(checkpoints, tmp_path / "third", steps=12)
    other["model"]["hiddenSize"] = 32
    exit_code, third = run_pod(tmp_path / "third", make_config(**other))
    assert exit_code == ExitCode.BAD_CONFIG
    assert "training.model.hiddenSize is 32" in third.report.message


@pytest.mark.parametrize(
    "fields",
    [
        {"optimizer": {"learningRate": 1e-5, "lookahead": {"steps": 1}}},
        {"optimizer": {"learningRate": 1e-5}, "consensus": {"localSteps": 4}},
    ],
    ids=["slow weights", "shared weights"],
)
@pytest.mark.usefixtures("plain_pod")
def test_whatever_keeps_a_copy_of_the_weights_begins_with_those_of_the_base(
    fields: dict[str, Any], tmp_path: Path, make_config: MakeConfig, checkpoints: Path
) -> None:
    before = weights(checkpoints)
    tuned = tuned_from(checkpoints, tmp_path / "tuned", steps=2, unfreezeStep=0, baseSyncSteps=1)
    exit_code, second = run_pod(tmp_path / "tuned", make_config(**tuned, **fields))
    assert exit_code == 0, second.log
    tuned_checkpoints = tmp_path / "tuned" / "default" / "demo-12345678"
    after = weights(tuned_checkpoints)
    for name in (name for name in before if name.startswith("model/")):
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-3, msg=name)
    names = [name for file in newest(tuned_checkpoints).values() for name in safetensors.torch.load(file)]
    assert sum("model/blocks.0.mixer.input.weight" in name for name in names) == 1, "a base that all have alike, once"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"gating": {"strategy": "GradientNorm", "ratioControl": "Fixed"}},
        {"gating": {"strategy": "GradientNorm", "fallback": "Never", "engine": "SinglePass", "targetMass": 0.6}},
        {"consensus": {"codec": "Auto", "bytesPerStep": 7000}},
        {"optimizer": {"name": "Sophia", "learningRate": 0.001, "curvatureSteps": 2, "lookahead": {"steps": 3}}},
        {"consensus": {"codec": "Int4", "localSteps": 3}, "gating": {"strategy": "Loss", "ratioControl": "Fixed"}},
        {"model": ADAPTED},
        {"model": THAWING, "consensus": {"hashCheckSteps": 1}},
        {"model": THAWING, "consensus": {"codec": "Int4", "localSteps": 3}, "recompute": "Blocks"},
        {
            "model": with_control(THAWING),
            "optimizer": {"name": "Muon", "lookahead": {"steps": 2}},
            "consensus": {"codec": "Int8", "hashCheckSteps": 1, "onDisagreement": "Stop"},
            "gating": {"strategy": "GradientNorm", "ratioControl": "Fixed", "engine": "SinglePass"},
        },
    ],
)
def test_an_interrupted_run_repeats_the_losses_of_an_uninterrupted_one_bit_for_bit(
    tmp_path: Path,
    make_config: MakeConfig,
    checkpoints: Path,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
) -> None:
    monkeypatch.setattr(gate, "INTERVAL_STEPS", 2)  # so that the ratio moves within the run
    monkeypatch.setattr(measurement, "INTERVAL_STEPS", 2)
    save_at_once(monkeypatch)
    exit_code, whole = run_pod(tmp_path / "whole", make_config(**fields))
    assert exit_code == 0, whole.log
    files = newest(checkpoints)
    assert len(files) == 2
    checkpoints.rename(tmp_path / "kept")

    with monkeypatch.context() as patch:
        stop_pod_in_step(patch, step=4, rank=1)
        exit_code, first = run_pod(tmp_path / "parts", make_config(**fields))
    assert exit_code == ExitCode.STOPPED, first.log
    assert committed_steps(checkpoints) == [3, 5]
    assert first.report.message.startswith(f"asked to stop: left at step 5, saved in {checkpoints}")
    assert first.final.checkpoint is not None
    assert first.final.checkpoint.step == 5

    exit_code, second = run_pod(tmp_path / "parts", make_config(attempt=2, **fields))
    assert exit_code == 0, second.log
    assert second.final.restored_from == first.final.checkpoint.uri
    assert min(second.values("loss")) == 6
    assert first.values("loss") | second.values("loss") == whole.values("loss")
    assert newest(checkpoints) == files
    if "fallback" in fields.get("gating", {}):
        assert len(set(whole.values("token_ratio").values())) > 1, "the ratio has moved"


def test_a_base_that_learns_moves_when_it_is_exchanged(
    tmp_path: Path, make_config: MakeConfig, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_at_once(monkeypatch)
    checkpoint = {"uri": str(tmp_path / "checkpoints"), "intervalSteps": 1, "keep": 8}
    config = make_config(model=THAWING, checkpoint=checkpoint, consensus={"hashCheckSteps": 1}, schedule={"steps": 6})
    exit_code, pod = run_pod(tmp_path, config)
    assert exit_code == 0, pod.log
    assert pod.final.healed_replicas == 0
    name = "model/blocks.0.mixer.input.weight"
    by_step = {step: weights(checkpoints, step)[name] for step in range(1, 7)}
    moved = [step for step in range(2, 7) if not torch.equal(by_step[step], by_step[step - 1])]
    assert moved == [4, 6]


def test_a_stop_in_the_last_step_lets_the_run_finish(
    tmp_path: Path, make_config: MakeConfig, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_pod_in_step(monkeypatch, step=7, rank=1)
    exit_code, pod = run_pod(tmp_path, make_config(export={"format": "HuggingFace"}))
    assert (exit_code, pod.final.phase, pod.final.step) == (0, TrainerPhase.FINISHED, 8), pod.log
    assert pod.final.export_uri == f"{checkpoints}/export"


@pytest.mark.parametrize(
    "gating",
    [
        {},
        {"strategy": "GradientNorm", "ratioControl": "Fixed", "tokenRatio": 0.999, "engine": "SinglePass"},
    ],  # which chooses every token
)
def test_the_number_of_processes_and_micro_batches_does_not_change_the_mathematics(
    tmp_path: Path, make_config: MakeConfig, gating: dict[str, Any]
) -> None:
    """Two ranks that exchange gradients are one process on the joined batch; so is accumulation."""
    losses = {}
    for name, processes, batch in (
        ("one", 1, {"sequences": 4}),
        ("two", 2, {"sequences": 4}),
        ("accumulated", 1, {"sequences": 4, "microSequences": 1}),
    ):
        config = make_config(processes=processes, batch=batch, gating=gating, checkpoint=None)
        exit_code, pod = run_pod(tmp_path / name, config)
        assert exit_code == 0, pod.log
        losses[name] = [float(loss) for loss in pod.values("loss").values()]
    assert len(losses["one"]) == 8
    assert losses["two"] == pytest.approx(losses["one"], abs=2e-5)
    assert losses["accumulated"] == pytest.approx(losses["one"], abs=2e-5)


def test_a_run_goes_on_with_another_number_of_processes(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    exit_code, whole = run_pod(tmp_path / "whole", make_config(checkpoint=None))
    assert exit_code == 0
    with monkeypatch.context() as patch:
        stop_pod_in_step(patch, step=4, rank=0)
        assert run_gang(tmp_path, make_config()) == [ExitCode.STOPPED]
    exit_code, pod = run_pod(tmp_path, make_config(attempt=2, processes=1))
    assert exit_code == 0, pod.log
    expected = {step: float(loss) for step, loss in whole.values("loss").items()}
    assert min(pod.values("loss")) > 5
    for step, loss in pod.values("loss").items():
        assert float(loss) == pytest.approx(expected[step], abs=2e-5)


@pytest.mark.parametrize("processes", [1, 3])
def test_a_run_with_local_steps_goes_on_from_the_shared_weights_with_another_number_of_ranks(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    fields = {"consensus": {"codec": "Int8", "localSteps": 3}, "batch": {"sequences": 6}, "schedule": {"steps": 12}}
    with monkeypatch.context() as patch:
        stop_pod_in_step(patch, step=6, rank=0)
        exit_code, first = run_pod(tmp_path, make_config(**fields))
    assert exit_code == ExitCode.STOPPED, first.log
    exit_code, pod = run_pod(tmp_path, make_config(attempt=2, processes=processes, **fields))
    assert exit_code == 0, pod.log
    assert min(pod.values("loss")) == 8
    assert float(pod.values("loss")[8]) < float(first.values("loss")[1]) - 0.5, "it has not begun anew"
    assert (pod.final.step, pod.final.healed_replicas, pod.final.skipped_steps) == (12, 0, 0)


def test_what_ranks_kept_of_their_gradients_goes_to_another_number_of_ranks(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    consensus = {"codec": "Int4", "everySteps": 4}
    state_dict, load_state_dict = CompressedExchange.state_dict, CompressedExchange.load_state_dict

    def note(exchange: CompressedExchange, when: str) -> None:
        torch.save(state_dict(exchange)["channels"], tmp_path / f"{when}-{os.environ['RANK']}.pt")

    def patched_state_dict(exchange: CompressedExchange) -> dict[str, Any]:
        note(exchange, "saved")
        return state_dict(exchange)

    def patched_load(exchange: CompressedExchange, state: dict[str, Any]) -> None:
        load_state_dict(exchange, state)
        note(exchange, "loaded")

    def kept(when: str, ranks: int) -> dict[str, torch.Tensor]:
        states = [torch.load(tmp_path / f"{when}-{rank}.pt") for rank in range(ranks)]
        return {kind: sum(state[kind]["kept"] for state in states) for kind in states[0]}

    monkeypatch.setattr(CompressedExchange, "state_dict", patched_state_dict)
    monkeypatch.setattr(CompressedExchange, "load_state_dict", patched_load)
    schedule = {"steps": 5}
    assert run_gang(tmp_path, make_config(schedule=schedule, consensus=consensus)) == [0]
    before = kept("saved", 2)
    assert before["matrices"].norm() > 0.1
    exit_code, pod = run_pod(tmp_path, make_config(attempt=2, processes=4, schedule=schedule, consensus=consensus))
    assert exit_code == 0, pod.log
    torch.testing.assert_close(kept("loaded", 4), before)


def test_a_finished_run_that_starts_again_trains_no_step(tmp_path: Path, make_config: MakeConfig) -> None:
    assert run_gang(tmp_path, make_config()) == [0]
    exit_code, pod = run_pod(tmp_path, make_config(attempt=2))
    assert (exit_code, pod.final.step, pod.values("loss")) == (0, 8, {}), pod.log


def test_a_checkpoint_is_taken_at_the_step_that_the_answer_names(
    tmp_path: Path, make_config: MakeConfig, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = tmp_path / "answer"

    def ask() -> None:
        url = f"http://127.0.0.1:{os.environ[names.ENV_STATUS_PORT]}/checkpoint"
        request = urllib.request.Request(url, method="POST", headers={"Authorization": "Bearer secret"})
        with urllib.request.urlopen(request) as response:
            answer.write_bytes(response.read())

    before_step(monkeypatch, step=3, rank=0, act=ask)
    checkpoint = {"intervalSteps": 0, "keep": 9}
    exit_code, pod = run_pod(tmp_path, make_config(checkpoint=checkpoint))
    assert exit_code == 0, pod.log
    assert json.loads(answer.read_bytes()) == {"step": 4}
    assert committed_steps(checkpoints) == [4, 8]
    assert pod.final.checkpoint_requested_step is None


def spoil(monkeypatch: pytest.MonkeyPatch, what: str, is_spoiled: Callable[[int], bool]) -> None:
    """Make rank 1's gradients, or one of its hidden states, infinite at some steps (from 0)."""
    forward_backward, hidden = PlainStep.forward_backward, PlainStep._hidden
    steps: list[int] = []

    def patched(self: PlainStep, batch: Batch, *, global_tokens: int, step: int) -> StepResult:
        steps.append(step)
        result = forward_backward(self, batch, global_tokens=global_tokens, step=step)
        if what == "gradients" and is_spoiled(step) and torch.distributed.get_rank() == 1:
            for parameter in self.model.parameters():
                assert parameter.grad is not None
                parameter.grad.fill_(float("inf"))
        return result

    def patched_hidden(self: PlainStep, batch: Batch) -> torch.Tensor:
        hidden_ND = hidden(self, batch)
        is_training = torch.is_grad_enabled()
        if what == "logits" and is_training and is_spoiled(steps[-1]) and torch.distributed.get_rank() == 1:
            return hidden_ND.index_fill(0, torch.tensor([0]), float("inf"))
        return hidden_ND

    monkeypatch.setattr(PlainStep, "forward_backward", patched)
    monkeypatch.setattr(PlainStep, "_hidden", patched_hidden)


@pytest.mark.parametrize(
    ("what", "told", "consensus"),
    [
        ("gradients", "gradients", {"codec": "Exact"}),
        ("logits", "logits of 1 token(s)", {"codec": "Exact"}),
        ("gradients", "gradients", {"codec": "Auto"}),
        ("logits", "logits of 1 token(s)", {"codec": "Int8"}),
        ("gradients", "gradients", {"codec": "Int4", "localSteps": 3}),
    ],
)
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all_and_told(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, what: str, told: str, consensus: Any
) -> None:
    spoil(monkeypatch, what, lambda step: step in (3, 5))
    exit_code, pod = run_pod(tmp_path, make_config(consensus={**consensus, "hashCheckSteps": 1}))
    assert (exit_code, pod.final.skipped_steps) == (0, 2), pod.log
    assert pod.final.notices == [
        f"by step 4 an update was left out because {told} were not finite; skippedSteps counts on"
    ]
    losses = {step: float(loss) for step, loss in pod.values("loss").items()}
    assert losses[8] < losses[1]


def test_the_gate_tells_what_it_does(tmp_path: Path, make_config: MakeConfig) -> None:
    gating = {
        "strategy": "GradientNorm",
        "ratioControl": "Fixed",
        "tokenRatio": 0.25,
        "warmupSteps": 2,
        "engine": "SinglePass",
    }
    exit_code, pod = run_pod(tmp_path, make_config(gating=gating))
    gate, difficulty = pod.final.gate, pod.final.difficulty
    assert exit_code == 0, pod.log
    assert gate is not None
    assert difficulty is not None
    assert (gate.decision, gate.ratio) == (GateDecision.GATED, 0.25)
    assert 0 < gate.saved_flops_ratio < 0.5
    assert [float(ratio) for ratio in pod.values("token_ratio").values()] == [1, 0.625, *[0.25] * 6]
    for histogram in (difficulty.gradient_norm, difficulty.entropy):
        assert sum(histogram.counts) == pod.final.tokens


def test_a_run_whose_gradients_stay_infinite_fails(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "gradients", lambda step: step >= 4)
    exit_code, pod = run_pod(tmp_path, make_config(schedule={"steps": 40}))
    assert exit_code == ExitCode.INTERNAL
    assert "gradients were not finite in 16 steps in a row up to step 20" in pod.report.message
    assert "Traceback" not in pod.log
