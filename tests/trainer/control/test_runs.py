"""Runs of two ranks with a controller: gated, with few bytes, in micro-batches, resumed, on another number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gangs import run_pod, save_at_once

from pylon_trainer.control import control
from pylon_trainer.control.control import Control

MakeConfig = Callable[..., dict[str, Any]]
MODEL = {
    "architecture": "Resonate",
    "layers": 2,
    "resonate": {"headWidth": 8, "stateSize": 8, "chunkTokens": 4, "attentionEvery": 2, "control": {"vectorSize": 16}},
}
GATED = {"strategy": "GradientNorm", "ratioControl": "Fixed", "tokenRatio": 0.5}
WATCHED = {"hashCheckSteps": 1, "onDisagreement": "Stop"}


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have turns end every other step, and advice checked in every other turn."""
    init = Control.__init__

    def patched(self: Control, *arguments: Any) -> None:
        init(self, *arguments)
        self._every = 2

    monkeypatch.setattr(Control, "__init__", patched)
    monkeypatch.setattr(control, "CHECK_STEPS", 4)


@pytest.mark.parametrize(
    "fields",
    [
        {"gating": GATED | {"engine": "SinglePass"}, "batch": {"sequences": 8, "microSequences": 2}},
        {"gating": GATED | {"engine": "TwoPass"}, "consensus": WATCHED | {"codec": "Int8"}},
        {"gating": GATED | {"granularity": "Sequence"}, "batch": {"sequences": 8}},
    ],
    ids=["SinglePass in micro-batches", "TwoPass in few bytes", "Sequence"],
)
def test_it_trains_and_replicas_agree(fields: dict[str, Any], tmp_path: Path, make_config: MakeConfig) -> None:
    fields = {"consensus": WATCHED} | fields
    exit_code, pod = run_pod(tmp_path, make_config(model=MODEL, schedule={"steps": 30}, checkpoint=None, **fields))
    assert exit_code == 0, pod.log
    losses = {step: float(loss) for step, loss in pod.values("loss").items()}
    assert losses[30] < losses[1] - 0.5
    report = pod.final.control
    assert report is not None
    assert report.kept_promise is not None  # advice at fresh ports may promise too little for a look at it to count
    assert 0 < report.update_ratio < 1


def test_it_goes_on_bit_for_bit_and_on_another_number_of_ranks(
    tmp_path: Path, make_config: MakeConfig, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_at_once(monkeypatch)
    recipe: dict[str, Any] = {"model": MODEL, "checkpoint": {"uri": str(checkpoints.parents[1]), "keep": 9}}
    exit_code, whole = run_pod(tmp_path / "whole", make_config(**recipe))
    assert exit_code == 0, whole.log

    # The last checkpoint is undone, and the run begins again from the one at step 6, with a turn still to be judged.
    (last,) = checkpoints.glob("step-000000000008-*")
    files = {path.name: path.read_bytes() for path in last.glob("rank-*.safetensors")}
    (last / "COMMITTED").unlink()
    exit_code, again = run_pod(tmp_path / "again", make_config(attempt=2, **recipe))
    assert exit_code == 0, again.log
    assert min(again.values("loss")) == 7
    assert again.values("loss").items() <= whole.values("loss").items()
    (last,) = checkpoints.glob("step-000000000008-attempt-000002-*")
    assert {path.name: path.read_bytes() for path in last.glob("rank-*.safetensors")} == files

    recipe["schedule"] = {"steps": 12}
    exit_code, more = run_pod(tmp_path / "more", make_config(attempt=3, processes=4, **recipe))
    assert exit_code == 0, more.log
    assert (min(more.values("loss")), more.final.step) == (9, 12)
