"""The benchmark of quality at equal time: its runs on a toy, its table and its corpus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gate_quality
import numpy as np
import pytest
import python_corpus
import quality_runs
import quality_table


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    ids = np.random.default_rng(0).integers(0, 200, 8000).astype(np.uint16)
    path = tmp_path / "corpus.npz"
    np.savez(path, python_train=ids, python_held_out=ids[:600], torch_train=ids[::-1].copy(), torch_held_out=ids[-600:])
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["gate_quality.py", *map(str, arguments)])
    return gate_quality.main()


def test_runs_of_equal_time_are_written_and_other_phases_are_kept(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality_runs, "ROUND_STEPS", 2)
    earlier = {
        "phase": "scratch",
        "device": "cpu",
        "strategy": "plain",
        "ratio": 1,
        "seed": 0,
        "seconds": 1,
        "loss": 3,
        "steps": 1,
    }
    (tmp_path / "gate_quality.json").write_text(json.dumps({"rows": [{**earlier, "step_ms": 1}]}))
    chosen = ("half batch", "gated 0.5", "exact 0.5, steps of gated 0.5")
    toy = ["--corpus", corpus, "--small", "--device", "cpu", "--pretrain-seconds", 0.2, "--results", tmp_path]
    options = [word for name in chosen for word in ("--strategy", name)]
    assert run(monkeypatch, *toy, "--phase", "late", "--seconds", 0.2, "--seeds", 1, *options) == 0
    rows = json.loads((tmp_path / "gate_quality.json").read_text())["rows"]
    assert [(row["phase"], row["strategy"]) for row in rows] == [
        ("scratch", "plain"),
        ("late", "plain"),
        ("late", "gated 0.5"),
        ("late", "half batch"),
        ("late", chosen[-1]),
    ]
    assert rows[-1]["steps"] == rows[2]["steps"]
    assert rows[2]["ratio"] == pytest.approx(0.5, abs=0.01)
    assert all(0 < row["loss"] < 12 for row in rows)


def test_a_missing_corpus_says_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--corpus", tmp_path / "none.npz")
    assert "--prepare" in capsys.readouterr().err


def rows_of(losses: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [
        {
            "phase": "late",
            "device": "cpu",
            "strategy": name,
            "seed": seed,
            "ratio": 1.0,
            "seconds": 1.0,
            "steps": 9,
            "step_ms": 1.0,
            "loss": loss,
        }
        for name, by_seed in losses.items()
        for seed, loss in enumerate(by_seed)
    ]


LOSSES = {
    "plain": [2.0, 3.0, 2.5],
    "plain, 1.3x the time": [1.9, 2.9, 2.4],
    "plain, 1.6x the time": [1.8, 2.8, 2.3],
    "gated": [1.85, 2.86, 2.34],
    "gated 0.5": [2.1, 2.95, 2.5],
    "half batch": [2.2, 3.21, 2.7],
    "gated 0.25": [1.5, 2.5, 2.0],
}


@pytest.mark.parametrize(
    ("strategy", "verdict", "plain_needs"),
    [
        ("plain", "", "1.00x"),
        ("gated", "better", "1.45x"),
        ("gated 0.5", "as plain", ""),
        ("half batch", "lost", ""),
        ("gated 0.25", "better", "over 1.6x"),
    ],
)
def test_the_table_judges_by_paired_differences(strategy: str, verdict: str, plain_needs: str) -> None:
    (line,) = [row for row in quality_table.summarise(rows_of(LOSSES)) if row["strategy"] == strategy]
    assert (line["verdict"], line["plain needs"]) == (verdict, plain_needs)


def test_one_seed_is_no_verdict() -> None:
    table = quality_table.summarise(rows_of({name: losses[:1] for name, losses in LOSSES.items()}))
    assert {line["verdict"] for line in table} == {"", "one seed"}


def test_the_corpus_splits_by_file_and_takes_equal_files_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("torch", "other", "copy_of_other"):
        (tmp_path / package).mkdir()
        for number in range(60):
            text = f"def {package.removeprefix('copy_of_')}_{number}():\n    return {number}\n"
            (tmp_path / package / f"module_{number}.py").write_text(text)
    monkeypatch.setattr(python_corpus, "_packages", lambda: sorted(tmp_path.iterdir()))
    monkeypatch.setattr(python_corpus, "HELD_OUT", 0.3)
    sources = list(python_corpus.read_sources())
    assert sorted(source.kind for source in sources) == ["python"] * 60 + ["torch"] * 60
    python_corpus.prepare(tmp_path / "out" / "corpus.npz")
    corpus = python_corpus.read_corpus(tmp_path / "out" / "corpus.npz")
    assert set(corpus) == {f"{kind}_{split}" for kind in ("python", "torch") for split in ("train", "held_out")}
    ends = {name: int((ids == ids[-1]).sum()) for name, ids in corpus.items()}
    assert sum(ends.values()) == len(sources)
    assert ends["python_held_out"] == sum(source.is_held_out and source.kind == "python" for source in sources)
