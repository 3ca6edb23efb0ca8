"""The benchmark of gradient exchange, on a toy: its rows and its budget; and what is reckoned from them."""

from __future__ import annotations

import json
from pathlib import Path

import consensus
import numpy as np
import pytest
from consensus_projection import project
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


MEASURED = {
    "ranks": 2,
    "bytes_per_step_mean": 1e6,
    "step_ms": 40.0,
    "communication_fraction": 0.01,
    "channels": "matrices Sign, vectors Float32",
    "is_exact": False,
}


def test_among_the_ranks_that_were_measured_it_is_what_was_measured() -> None:
    there = project(MEASURED, 2)
    assert (there["bytes_per_step"], there["communication_ms"], there["of_step_now"]) == pytest.approx((1e6, 0.4, 0.01))


def test_more_ranks_are_more_collectives_and_hops() -> None:
    there = project(MEASURED, 8)
    # 5 collectives where there were 3, with 6 hops more in each, 12 in the reduction; 1.75 MB at 300 GB/s where 1 was.
    assert there["communication_ms"] == pytest.approx(0.4 * 5 / 3 + 6 * 6 * 1.9e-3 + 0.75 / 300)
    assert there["bytes_per_step"] == pytest.approx(1.75e6)


def test_more_hosts_are_a_network() -> None:
    there = project(MEASURED, 64)
    hops_ms = (56 * 1.9 + 7 * 4.0 - 1.9) / 1e3
    bytes_ms = 1e6 * (2 * 63 / 64) / 50e9 * 1e3 - 1e6 / 300e9 * 1e3
    assert there["communication_ms"] == pytest.approx(0.4 * 5 / 3 + 6 * hops_ms + bytes_ms)


def test_an_exact_sum_is_not_reckoned() -> None:
    with pytest.raises(ValueError, match="in buckets"):
        project(MEASURED | {"is_exact": True}, 8)


def test_the_page_holds_the_tables_of_what_was_measured() -> None:
    tables = build_tables(read_rows("consensus", RESULTS))
    assert BEGIN + tables + END in PAGE.read_text(), "run benchmarks/consensus_table.py --write"
