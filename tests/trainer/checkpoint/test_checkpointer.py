"""Checkpoints survive kills between any two writes, damage to any file, a full disk, an older attempt that lives on."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gangs import fork, wait
from pylon_trainer.checkpoint.checkpointer import Checkpointer, open_other

from pylon_trainer.checkpoint.storage import Storage
from pylon_trainer.errors import PeerLost, StorageError

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json", "COMMITTED"]


def state(step: int) -> dict[str, Any]:
    return {
        "model": {"blocks.0.weight": torch.full((3, 2), float(step)), "norm": torch.ones(2, dtype=torch.bfloat16)},
        "optimizer": {"moments": {"a/b": torch.arange(step)}, "updates": torch.tensor(step)},
        "position": {"step": step, "name": "é", "list": [1, 2.5, None]},
        "empty": {},
    }


def make(directory: Path, attempt: int = 1, keep: int = 2) -> Checkpointer:
    return Checkpointer(Storage(str(directory), sleep=lambda _: None), attempt, keep)


def restored_step(directory: Path, notices: list[str] | None = None, step: int | None = None) -> int | None:
    found = make(directory).restore([].append if notices is None else notices.append, step)
    return None if found is None else found[1].step


def places(directory: Path) -> list[tuple[int, int]]:
    """Step and attempt of every checkpoint's directory, committed or not."""
    names = [path.name.split("-") for path in directory.glob("step-*")]
    return sorted((int(name[1]), int(name[3])) for name in names)


def file_of(directory: Path, step: int, file: str) -> Path:
    (path,) = directory.glob(f"step-{step:012d}-*/{file}")
    return path


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    report = make(tmp_path).save(5, state(5))
    found = make(tmp_path, attempt=2).restore(pytest.fail)
    assert found is not None
    restored, again = found
    assert again == report
    assert report.uri.startswith(str(tmp_path))
    assert report.size_bytes == sum(file_of(tmp_path, 5, file).stat().st_size for file in FILES[:3])
    assert restored["position"] == state(5)["position"]
    assert restored["empty"] == {}
    for part in ("model", "optimizer"):
        torch.testing.assert_close(restored[part], state(5)[part], rtol=0, atol=0)


def test_nothing_saved_is_nothing_restored(tmp_path: Path) -> None:
    assert restored_step(tmp_path / "absent") is None


def test_the_newest_are_kept_and_the_newest_is_restored(tmp_path: Path) -> None:
    checkpointer = make(tmp_path, keep=2)
    for step in (1, 2, 3, 10):
        checkpointer.save(step, state(step))
    assert places(tmp_path) == [(3, 1), (10, 1)]
    assert restored_step(tmp_path) == 10
    assert restored_step(tmp_path, step=3) == 3
    assert restored_step(tmp_path, step=4) is None


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("file", FILES)
def test_a_kill_around_any_write_leaves_the_previous_one_or_the_new_one(tmp_path: Path, file: str, when: str) -> None:
    make(tmp_path, keep=1).save(1, state(1))

    def run() -> None:
        class DeadlyStorage(Storage):
            def write(self, path: str, data: bytes) -> None:
                if path.endswith(file) and when == "before":
                    super().write(path, data[: len(data) // 2])  # what a torn write leaves
                    os.kill(os.getpid(), signal.SIGKILL)
                super().write(path, data)
                if path.endswith(file):
                    os.kill(os.getpid(), signal.SIGKILL)

        Checkpointer(DeadlyStorage(str(tmp_path)), attempt=1, keep=1).save(2, state(2))

    assert wait(fork(run)) == 128 + signal.SIGKILL
    notices: list[str] = []
    is_committed = (file, when) == ("COMMITTED", "after")
    assert restored_step(tmp_path, notices) == (2 if is_committed else 1)
    make(tmp_path, attempt=2, keep=1).save(3, state(3))
    assert places(tmp_path) == [(3, 2)]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "remove", "grow"])
@pytest.mark.parametrize("file", FILES)
def test_any_damage_falls_back_to_the_previous_one_and_says_so(tmp_path: Path, file: str, damage: str) -> None:
    checkpointer = make(tmp_path)
    checkpointer.save(1, state(1))
    checkpointer.save(2, state(2))
    path = file_of(tmp_path, 2, file)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    changed = {"cut": bytes(data[:-1]), "flip": bytes(data), "empty": b"", "grow": path.read_bytes() + b" "}
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(changed[damage])
    notices: list[str] = []
    # Space after the marker's JSON harms nothing; without a marker there never was a checkpoint to pass over.
    harmless, silent = (file, damage) == ("COMMITTED", "grow"), (file, damage) == ("COMMITTED", "remove")
    if (file, damage) == ("COMMITTED", "flip"):
        path.write_bytes(path.read_bytes().replace(b'"', b"'", 1))
    assert restored_step(tmp_path, notices) == (2 if harmless else 1)
    assert len(notices) == (0 if harmless or silent else 1)
    for notice in notices:
        assert notice.startswith(f"passed over {path.parent}: ")
        assert file in notice


def test_when_all_are_damaged_nothing_is_begun_anew_in_silence(tmp_path: Path) -> None:
    make(tmp_path).save(1, state(1))
    file_of(tmp_path, 1, "model.safetensors").write_bytes(b"")
    with pytest.raises(StorageError, match=f"no checkpoint is whole .*; remove {tmp_path} to begin anew"):
        restored_step(tmp_path)


def test_a_damaged_one_never_pushes_out_a_whole_one(tmp_path: Path) -> None:
    first = make(tmp_path, keep=1)
    first.save(1, state(1))
    make(tmp_path, keep=2).save(6, state(6))
    file_of(tmp_path, 6, "model.safetensors").write_bytes(b"")
    second = make(tmp_path, attempt=2, keep=1)
    assert second.restore([].append) is not None
    second.save(3, state(3))
    assert places(tmp_path) == [(3, 2)]
    assert restored_step(tmp_path) == 3


@pytest.mark.parametrize("file", FILES)
def test_a_full_disk_leaves_no_part_of_the_new_one_and_the_old_one_whole(
    tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = make(tmp_path, keep=1)
    checkpointer.save(1, state(1))
    write: Callable[[Storage, str, bytes], None] = Storage._write

    def full(self: Storage, path: str, data: bytes) -> None:
        if path.endswith(file):
            write(self, path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, path, data)

    monkeypatch.setattr(Storage, "_write", full)
    with pytest.raises(StorageError, match="no space left there"):
        checkpointer.save(2, state(2))
    assert places(tmp_path) == [(1, 1)]
    assert restored_step(tmp_path) == 1


def test_an_older_attempt_commits_nothing_once_a_newer_one_has_begun(tmp_path: Path) -> None:
    older, newer = make(tmp_path, attempt=1), make(tmp_path, attempt=2)
    older.claim()
    older.save(1, state(1))
    newer.claim()
    with pytest.raises(PeerLost, match="attempt 2 has begun, so attempt 1 commits nothing more"):
        older.save(2, state(2))
    assert places(tmp_path) == [(1, 1)]
    newer.save(2, state(2))
    assert places(tmp_path) == [(1, 1), (2, 2)]


def test_an_older_attempt_removes_nothing_of_a_newer_one(tmp_path: Path) -> None:
    """Not even when it passed the check just before the newer one began."""
    older, newer = make(tmp_path, attempt=1, keep=1), make(tmp_path, attempt=2, keep=1)
    newer.save(4, state(4))
    older.save(9, state(9))
    assert (4, 2) in places(tmp_path)
    assert restored_step(tmp_path) == 4


def test_older_ones_go_only_after_the_newer_one_is_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    for verb in ("write", "remove"):
        original = getattr(Storage, verb)

        def record(self: Storage, path: str, *data: bytes, verb: str = verb, original: Any = original) -> None:
            events.append((verb, path.rpartition("/")[2]))
            original(self, path, *data)

        monkeypatch.setattr(Storage, verb, record)
    checkpointer = make(tmp_path, keep=1)
    checkpointer.save(1, state(1))
    events.clear()
    checkpointer.save(2, state(2))
    verbs = [verb for verb, _ in events]
    assert events[verbs.index("remove") - 1] == ("write", "COMMITTED")
    assert "write" not in verbs[verbs.index("remove") :]


def test_another_runs_checkpoints_are_found_by_either_uri(tmp_path: Path) -> None:
    checkpointer = make(tmp_path, keep=9)
    uris = {step: checkpointer.save(step, state(step)).uri for step in (1, 2)}
    for uri, step in ((str(tmp_path), 2), (uris[1], 1), (uris[2] + "/", 2)):
        other, single_step = open_other(uri)
        found = other.restore(pytest.fail, single_step)
        assert found is not None
        assert found[1].step == step


def test_a_checkpoint_of_a_later_format_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path).save(1, state(1))
    with monkeypatch.context() as patch:
        patch.setattr("pylon_trainer.checkpoint.format._FORMAT", 2)
        make(tmp_path).save(2, state(2))
    notices: list[str] = []
    assert restored_step(tmp_path, notices) == 1
    assert "format 2 is not known" in notices[0]


def test_two_saves_of_one_step_never_share_a_directory(tmp_path: Path) -> None:
    assert make(tmp_path, keep=9).save(1, state(1)).uri != make(tmp_path, keep=9).save(1, state(1)).uri
