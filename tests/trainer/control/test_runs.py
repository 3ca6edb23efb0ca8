"""Runs with a controller: with every engine, compiled, resumed, on other numbers of ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gangs import run_pod

MakeConfig = Callable[..., dict[str, Any]]
MODEL = {
    "architecture": "Resonate",
    "layers": 2,
    "resonate": {
        "headWidth": 8,
        "stateSize": 8,
        "chunkTokens": 4,
        "attentionEvery": 2,
        "control": {"outerEverySteps": 8, "vectorSize": 16},
    },
}
GATED = {"strategy": "GradientNorm", "ratioControl": "Fixed", "tokenRatio": 0.5}


@pytest.mark.parametrize(
    "fields",
    [
        {"batch": {"sequences": 8, "microSequences": 2}},
        {"gating": GATED | {"engine": "SinglePass"}},
        {"gating": GATED | {"engine": "TwoPass", "rowActivations": "Recompute"}},
        {"gating": GATED | {"granularity": "Sequence"}, "batch": {"sequences": 8}},
        {"consensus": {"codec": "Int8"}},
    ],
    ids=["micro-batches", "SinglePass", "TwoPass", "Sequence", "Int8"],
)
def test_it_trains_and_replicas_agree(fields: dict[str, Any], tmp_path: Path, make_config: MakeConfig) -> None:
    fields = {"consensus": {}} | fields
    config = make_config(
        model=MODEL,
        schedule={"steps": 40},
        checkpoint=None,
        **fields | {"consensus": fields["consensus"] | {"hashCheckSteps": 1, "onDisagreement": "Stop"}},
    )
    exit_code, pod = run_pod(tmp_path, config)
    assert exit_code == 0, pod.log
    losses = {step: float(loss) for step, loss in pod.values("loss").items()}
    assert losses[40] < losses[1] - 0.5
    control = pod.final.control
    assert control is not None
    assert control.update_ratio is not None
