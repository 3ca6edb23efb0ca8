"""The benchmark against the published library, with Pylon's own contender on a toy."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gate_published
import pytest
import torch


def test_a_missing_published_library_is_named_and_pylon_still_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 64}
    monkeypatch.setitem(gate_published.SHAPES, "cpu", (fields | {"intermediate_size": 64}, 4, 16))
    monkeypatch.setattr(gate_published, "ROUNDS", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "cggr", None)
    monkeypatch.setattr("sys.argv", ["gate_published.py", "--results", str(tmp_path)])
    assert gate_published.main() == 1
    assert "failed: published" in capsys.readouterr().err
    (row,) = json.loads((tmp_path / "gate_published.json").read_text())["rows"]
    assert (row["contender"], row["granularity"], row["ratio"]) == ("Pylon", "sequence", 0.25)
    assert row["step_ms"] > 0
