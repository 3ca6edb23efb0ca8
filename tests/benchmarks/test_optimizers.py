"""The benchmark of optimizers: its rows on a toy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import optimizers
import pytest
import quality_runs

from pylon_api.training import OptimizerName


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["optimizers.py", *map(str, arguments)])
    return optimizers.main()


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "device_name", lambda: "cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setitem(optimizers.SHAPES, "cpu", {"toy": ({"layers": 1, "hidden_size": 32, "heads": 2}, 64)})
    monkeypatch.setattr(optimizers, "RATES", {"Lion": (1e-4, 3e-4), "Sophia": (1e-3,)})
    monkeypatch.setattr(quality_runs, "ROUND_STEPS", 2)


def test_every_optimizer_is_measured_beside_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):  # the second call replaces what the first has written
        assert run(monkeypatch, "updates", "--repeats", 1, "--results", tmp_path) == 0
    rows = json.loads((tmp_path / "optimizer_updates.json").read_text())["rows"]
    bytes_per_parameter = {row["optimizer"]: row["state_bytes_per_parameter"] for row in rows}
    assert len(bytes_per_parameter) == len(rows)
    assert {*OptimizerName, "AdamW + Lookahead", "torch's fused AdamW"} <= bytes_per_parameter.keys()
    assert bytes_per_parameter["AdamW"] == pytest.approx(8, abs=0.1)
    assert bytes_per_parameter["AdamW + Lookahead"] == pytest.approx(12, abs=0.1)


def test_losses_are_measured_at_every_rate_and_other_optimizers_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "corpus.npz"
    ids = np.random.default_rng(0).integers(0, 200, 8000).astype(np.uint16)
    np.savez(corpus, python_train=ids, python_held_out=ids[:600], torch_train=ids, torch_held_out=ids[:600])
    toy = ["losses", "--small", "--steps", 2, "--corpus", corpus, "--results", tmp_path]
    for name in ("Sophia", "Lion"):
        assert run(monkeypatch, *toy, "--optimizer", name) == 0
    rows = json.loads((tmp_path / "optimizer_losses.json").read_text())["rows"]
    assert [(row["optimizer"], row["learning_rate"]) for row in rows] == [
        ("Sophia", 1e-3),
        ("Lion", 1e-4),
        ("Lion", 3e-4),
    ]
    assert all(row["steps"] == 2 and 0 < row["loss"] < 12 for row in rows)
