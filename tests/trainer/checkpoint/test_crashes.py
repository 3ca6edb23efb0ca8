"""Whatever change to the store a save dies at, or is refused at: the newest committed checkpoint is whole, nothing
half-written is offered, and the next save works and cleans up."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_storage import WHEN, FaultyStorage, die, refuse
from gangs import fork
from saved_checkpoints import Run, offered, places, restore

from pylon_trainer.checkpoint.audit import audit
from pylon_trainer.checkpoint.storage import Storage
from pylon_trainer.errors import StorageError

STORY = [(1, 1), (1, 2), (1, 3), (2, 3), (2, 4)]
"""Attempts and steps of the saves that are made one after another, in their order."""
KEEP = 2


@pytest.fixture(autouse=True)
def _pages_survive_a_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a power cut needs fsync, and it is slow."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def tell(storage: Storage) -> None:
    """The story: two attempts that save. A save that is refused is given up, and the attempt goes on."""
    run: Run | None = None
    with (Path(storage.uri).parent / "durable").open("a", buffering=1) as durable:
        for attempt, step in STORY:
            try:
                if run is None or run.attempt != attempt:
                    run = Run(storage, attempt, KEEP).begin()
                run.save(step)
            except StorageError:
                continue
            print(attempt, step, file=durable)


def durable(directory: Path) -> list[tuple[int, int]]:
    """What was committed for certain."""
    lines = (directory / "durable").read_text().splitlines()
    return [(int(attempt), int(step)) for attempt, step in map(str.split, lines)]


def cases(directory: Path, storage_class: type[FaultyStorage] = FaultyStorage) -> Iterator[tuple[int, Path]]:
    """Every change of the story, each with an empty directory."""
    whole = directory / "whole"
    whole.mkdir(parents=True)
    storage = storage_class(str(whole / "job"))
    tell(storage)
    assert durable(whole) == STORY
    for at in range(storage.changes):
        place = directory / str(at)
        place.mkdir()
        yield at, place
        shutil.rmtree(place)


def kill(directory: Path, at: int, when: str, storage_class: type[FaultyStorage] = FaultyStorage) -> None:
    pid = fork(lambda: tell(storage_class(str(directory / "job"), at, when, die)))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def check_that_the_newest_is_whole(directory: Path, storage: Storage) -> tuple[int, int] | None:
    """Its attempt and step. At most the save that was under way may be committed beyond those that are known to be."""
    known = durable(directory)
    told: list[str] = []
    found = restore(storage, told.append)
    newest = None if found is None else (found.manifest.attempt, found.manifest.step)
    under_way = next((save for save in STORY if save not in known), None)
    assert newest in ((known[-1] if known else None), under_way)
    assert all("COMMITTED" in line for line in told)  # a marker that was cut is the only thing to pass over
    for each in offered(Run(storage, 3).archive, told.append):
        assert list(audit(storage, each)) == []
    return newest


def check_that_the_next_save_works_and_cleans_up(storage: Storage, newest: tuple[int, int] | None) -> None:
    Run(storage, 3, KEEP).begin().save(7)
    assert places(storage) == [*([newest] if newest else []), (3, 7)]
    assert restore(storage, pytest.fail) is not None
    assert storage.names("attempts") == ["attempt-000003"]
    assert {path.name for path in Path(storage.uri).iterdir()} == {"attempts", *storage.names()}


@pytest.mark.parametrize("when", WHEN)
def test_a_kill_at_any_change_loses_nothing_that_was_committed(tmp_path: Path, when: str) -> None:
    count = 0
    for at, directory in cases(tmp_path / "cases"):
        kill(directory, at, when)
        storage = Storage(str(directory / "job"))
        newest = check_that_the_newest_is_whole(directory, storage)
        check_that_the_next_save_works_and_cleans_up(storage, newest)
        count += 1
    assert count > 40


class BlindStorage(FaultyStorage):
    """Its listings show nothing."""

    def names(self, path: str = "") -> list[str]:
        return []


def test_a_kill_at_any_change_loses_nothing_even_where_listings_show_nothing(tmp_path: Path) -> None:
    """Where a file appears whole or not at all, as in object stores."""
    for at, directory in cases(tmp_path / "cases", BlindStorage):
        kill(directory, at, "after", BlindStorage)
        storage = BlindStorage(str(directory / "job"))
        check_that_the_newest_is_whole(directory, storage)
        Run(storage, 3, KEEP).begin().save(7)
        assert restore(storage, pytest.fail) is not None


@pytest.mark.parametrize(("when", "lasts"), [("midway", False), ("after", False), ("midway", True)])
def test_a_store_that_is_full_or_out_of_reach_at_any_change_loses_nothing(
    tmp_path: Path, when: str, lasts: bool
) -> None:
    for at, directory in cases(tmp_path / "cases"):
        tell(FaultyStorage(str(directory / "job"), at, when, refuse, lasts))
        storage = Storage(str(directory / "job"))
        newest = check_that_the_newest_is_whole(directory, storage)
        if not lasts:  # all other saves went well
            assert len(durable(directory)) >= len(STORY) - 1
            assert newest == durable(directory)[-1]
        check_that_the_next_save_works_and_cleans_up(storage, newest)
