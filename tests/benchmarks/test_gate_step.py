"""The benchmark of gated steps, on a toy."""

from __future__ import annotations

import json
from pathlib import Path

import gate_step
import pytest
import torch

KEYS = {
    "shape",
    "device",
    "engine",
    "granularity",
    "ratio",
    "step_ms",
    "plain_ms",
    "speedup",
    "memory_ratio",
    "backward_flop_ratio",
    "syncs",
    "recompiles",
}


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = gate_step.Shape({"layers": 2, "hidden_size": 32, "heads": 2}, 64, sequences=4, tokens=16)
    monkeypatch.setitem(gate_step.SHAPES, "cpu", {"toy": shape})
    monkeypatch.setattr(gate_step, "ROUNDS", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.slow
@pytest.mark.usefixtures("toy")
def test_a_failed_kind_is_named_and_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engines = {
        "SinglePass Truncated Keep": ({"engine": "SinglePass"}, (0.5, 1.0)),
        "Broken": ({"engine": "NoSuchEngine"}, (0.5,)),
    }
    monkeypatch.setattr(gate_step, "ENGINES", engines)
    monkeypatch.setattr("sys.argv", ["gate_step.py", "--results", str(tmp_path)])
    assert gate_step.main() == 1
    assert "failed: Broken 0.5" in capsys.readouterr().err
    rows = json.loads((tmp_path / "gate_step.json").read_text())["rows"]
    assert [(row["engine"], row["ratio"]) for row in rows] == [
        ("Plain", 1.0),
        ("SinglePass Truncated Keep", 0.5),
        ("SinglePass Truncated Keep", 1.0),
    ]
    assert all(row.keys() >= KEYS for row in rows)
    plain, half, whole = rows
    assert plain["speedup"] == 1
    assert half["backward_flop_ratio"] < 0.8
    assert whole["gradient_difference"] == pytest.approx(0, abs=1e-5)
