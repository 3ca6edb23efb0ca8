"""The benchmark of checkpoints: what it makes of the times it took, and a run on a toy."""

from __future__ import annotations

import json
from pathlib import Path

import checkpoint
import pytest
import torch
from checkpoint_engines import TorchSave
from checkpoint_limits import store_bytes_per_s
from checkpoint_loop import Save, Timeline
from checkpoint_row import Case, goals, row_of
from gate_step import Shape

KEYS = {
    "engine",
    "store",
    "state_gib",
    "device",
    "stall_ms",
    "step_ms",
    "slowdown",
    "bytes_per_s",
    "store_bytes_per_s",
    "d2h_fraction",
    "host_gib",
}
CASE = Case("/store", state_bytes=1000, store_bytes_per_s=500.0, copy_bytes_per_s=20_000.0)


def a_timeline(*durations_s: float, begun_s: float, copied_s: float | None, durable_s: float) -> Timeline:
    """Three steps, a save, and the others; from time 0 on."""
    ends_s = [sum(durations_s[: number + 1]) for number in range(len(durations_s))]
    return Timeline(ends_s, 3, begun_s, copied_s, durable_s)


def test_a_row_tells_the_step_of_the_copy_from_those_of_the_upload() -> None:
    timeline = a_timeline(1, 1, 1, 1.5, 1.1, 1.3, 7, begun_s=2.5, copied_s=3.1, durable_s=5.8)
    row = row_of(CASE, "slab", [timeline], host_bytes=2**29, matches=True)
    assert row.keys() >= KEYS
    assert row["step_ms"] == 1000
    assert row["stall_ms"] == row["stall_max_ms"] == pytest.approx(500)
    assert row["stall_fraction_of_step"] == pytest.approx(0.5)
    assert row["upload_steps"] == 2
    assert row["upload_slowdown"] == pytest.approx(0.2)
    assert row["slowdown"] == pytest.approx(0.3)
    assert row["interval_at_1_percent_s"] == pytest.approx(50)
    assert row["host_gib"] == 0.5


@pytest.mark.parametrize(
    ("begun_s", "ready_s"),
    [(2.5, 3.0), (3.4, 3.4)],
    ids=["a host that runs ahead asks before the state is there", "a host that is late"],
)
def test_a_save_is_timed_from_when_there_is_something_to_save(begun_s: float, ready_s: float) -> None:
    timeline = a_timeline(1, 1, 1, 1, 1, begun_s=begun_s, copied_s=ready_s + 0.1, durable_s=ready_s + 2)
    row = row_of(CASE, "slab", [timeline], host_bytes=0, matches=True)
    assert row["copy_ms"] == pytest.approx(100)
    assert row["d2h_fraction"] == pytest.approx(0.5)
    assert row["bytes_per_s"] == pytest.approx(500)
    assert row["store_fraction"] == pytest.approx(1.0)


def test_a_save_that_ends_within_its_step_slows_no_other() -> None:
    timeline = a_timeline(1, 1, 1, 3, 1, begun_s=3, copied_s=None, durable_s=5)
    row = row_of(CASE, "torch.save", [timeline], host_bytes=0, matches=True)
    assert (row["upload_slowdown"], row["copy_ms"], row["d2h_fraction"]) == (None, None, None)
    assert any("2.00 steps" in goal for goal in goals(row))


def test_the_limit_of_a_store_leaves_nothing_behind(tmp_path: Path) -> None:
    assert store_bytes_per_s(str(tmp_path), 100_000) > 0
    assert list(tmp_path.iterdir()) == []


class Refusing(TorchSave):
    """A store that is full."""

    def begin(self, number: int) -> Save:
        raise OSError("no space left")


class Careless(TorchSave):
    """Saves what the state becomes, not what it was."""

    def begin(self, number: int) -> Save:
        for tensors in self._state.values():
            for tensor in tensors.values():
                tensor.add_(1)
        return super().begin(number)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape({"layers": 1, "hidden_size": 32, "heads": 2}, 64, sequences=2, tokens=16)
    monkeypatch.setitem(checkpoint.SHAPES, "cpu", {"toy": shape})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def run(monkeypatch: pytest.MonkeyPatch, directory: Path, *options: str) -> int:
    store = directory / "store"
    store.mkdir()
    arguments = ["--store", str(store), "--checkpoints", "1", "--results", str(directory)]
    monkeypatch.setattr("sys.argv", ["checkpoint.py", *arguments, *options])
    return checkpoint.main()


def rows_in(directory: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = json.loads((directory / "checkpoint.json").read_text())["rows"]
    return rows


@pytest.mark.usefixtures("toy")
def test_an_engine_that_fails_is_named_and_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(checkpoint.ENGINES, "refusing", Refusing)
    assert run(monkeypatch, tmp_path, "--engine", "refusing", "--engine", "slab", "--engine", "torch.save") == 1
    assert "failed: refusing" in capsys.readouterr().err
    rows = rows_in(tmp_path)
    assert [row["engine"] for row in rows] == ["slab", "torch.save"]
    assert all(row.keys() >= KEYS for row in rows)
    assert all(row["matches"] for row in rows)
    assert list((tmp_path / "store").iterdir()) == []


@pytest.mark.usefixtures("toy")
def test_a_checkpoint_of_another_moment_counts_as_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(checkpoint.ENGINES, "careless", Careless)
    assert run(monkeypatch, tmp_path, "--engine", "careless") == 1
    assert "not what the state was" in capsys.readouterr().err
    assert [row["matches"] for row in rows_in(tmp_path)] == [False]


@pytest.mark.slow
@pytest.mark.usefixtures("toy")
@pytest.mark.filterwarnings("ignore")
def test_torchs_own_engines_save_the_same_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, tmp_path, "--engine", "dcp-thread", "--engine", "dcp-process") == 0
    assert [(row["engine"], row["matches"]) for row in rows_in(tmp_path)] == [
        ("dcp-thread", True),
        ("dcp-process", True),
    ]
    assert not torch.distributed.is_initialized()


@pytest.mark.usefixtures("toy")
def test_a_store_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "no-directory").touch()
    assert run(monkeypatch, tmp_path, "--store", str(tmp_path / "no-directory"), "--engine", "torch.save") == 1
    assert "no-directory" in capsys.readouterr().err
    assert [row["store"] for row in rows_in(tmp_path)] == [str(tmp_path / "store")]


@pytest.mark.usefixtures("toy")
def test_what_does_not_fit_in_the_time_is_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, "--minutes", "0") == 0
    assert "slab: left out" in capsys.readouterr().out
    assert not (tmp_path / "checkpoint.json").exists()
