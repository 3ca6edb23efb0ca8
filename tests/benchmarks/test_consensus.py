"""The benchmark of gradient exchange, on a toy: its rows, its budget and its projection."""

from __future__ import annotations

import json
from pathlib import Path

import consensus
import numpy as np
import pytest
from consensus_table import BEGIN, END, PAGE, build_tables
from measure import RESULTS, read_rows

LOCAL = "Int4,localSteps=8,outerRate=1,outerMomentum=0.5"


@pytest.mark.slow
def test_codecs_are_compared_with_the_exact_sum_of_their_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.random.default_rng(0).integers(0, 200, 20_000).astype(np.uint16)
    np.savez(tmp_path / "corpus.npz", python_train=ids, python_held_out=ids[:1300])
    options = [
        "--scale",
        "small",
        "--ranks",
        2,
        "--steps",
        24,
        "--recipes",
        "Exact",
        "Int8",
        "Auto",
        LOCAL,
        "--seeds",
        3,
    ]
    options += ["--corpus", tmp_path / "corpus.npz", "--results", tmp_path, "--bytes-per-step", 30_000]
    monkeypatch.setattr("sys.argv", ["consensus.py", *map(str, options)])
    consensus.main()
    rows = {row["codec"]: row for row in json.loads((tmp_path / "consensus.json").read_text())["rows"]}
    assert list(rows) == ["Exact", "Int8", "Auto", "Int4"]
    assert all(row["counted_bytes"] == row["counted_by_transport"] for row in rows.values())
    assert all(row["exact_loss"] == rows["Exact"]["loss"] and row["seed"] == 3 for row in rows.values())
    assert rows["Exact"]["below_bf16_ddp"] == pytest.approx(0.5, rel=1e-3)
    assert rows["Int8"]["below_bf16_ddp"] == pytest.approx(2, rel=0.03)
    assert rows["Int8"]["loss"] == pytest.approx(rows["Exact"]["loss"], rel=1e-2)
    assert rows["Int4"]["below_bf16_ddp"] == pytest.approx(30, rel=0.05)
    assert (rows["Int4"]["local_steps"], rows["Int4"]["outer_momentum"]) == (8, 0.5)
    assert rows["Auto"]["bytes_per_step_peak"] <= 30_000
    projected = json.loads((tmp_path / "consensus_projection.json").read_text())["rows"]
    assert {row["ranks"] for row in projected} == {8, 64, 1024}
    assert all(row["projection"] for row in projected)
    exact = next(row for row in projected if row["codec"] == "Exact" and row["ranks"] == 8)
    assert exact["bytes_per_step"] == pytest.approx(rows["Exact"]["bytes_per_step_mean"] * 2 * 7 / 8, rel=1e-3)


def test_the_page_holds_the_tables_of_what_was_measured() -> None:
    rows, projected = read_rows("consensus", RESULTS), read_rows("consensus_projection", RESULTS)
    assert BEGIN + build_tables(rows, projected) + END in PAGE.read_text(), "run benchmarks/consensus_table.py --write"
