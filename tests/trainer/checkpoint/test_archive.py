"""The archive's promises: the newest whole one is found, older ones go only after it, older attempts harm nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from saved_checkpoints import Run, manifest, offered, places, restore, write_files

from pylon_trainer.checkpoint.archive import Archive, open_other
from pylon_trainer.checkpoint.manifest import COMMITTED, PART_BYTES, DamagedCheckpoint
from pylon_trainer.checkpoint.storage import Storage
from pylon_trainer.errors import ConfigError, PeerLost, StorageError

if TYPE_CHECKING:
    from s3_faults import FaultyStore


@pytest.fixture(params=["{path}", "memory://{name}"], ids=["disk", "memory"])
def storage(tmp_path: Path, request: pytest.FixtureRequest) -> Storage:
    return Storage(str(request.param).format(path=tmp_path, name=tmp_path.name) + "/job")


def restored(storage: Storage, told: list[str] | None = None, attempt: int = 3) -> tuple[int, int] | None:
    """Attempt and step of what is restored."""
    found = restore(storage, [].append if told is None else told.append, attempt)
    return found and (found.manifest.attempt, found.manifest.step)


def steps_offered(archive: Archive) -> list[int]:
    return [found.manifest.step for found in offered(archive, pytest.fail)]


class BlindStorage(Storage):
    """A store whose listings show nothing that was written since the last look."""

    shown: dict[str, list[str]] = {}

    def look(self) -> None:
        self.shown = {path: super(BlindStorage, self).names(path) for path in ("", "attempts")}

    def names(self, path: str = "") -> list[str]:
        return self.shown.get(path, [])


class RecordingStorage(Storage):
    """Notes what changes the store, in order."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.events: list[tuple[str, str]] = []

    def write(self, path: str, data: bytes) -> None:
        self.events.append(("write", path))
        super().write(path, data)

    def create(self, path: str, data: bytes) -> None:
        self.events.append(("create", path))
        super().create(path, data)

    def remove(self, path: str) -> None:
        self.events.append(("remove", path))
        super().remove(path)

    def abandon_uploads(self, path: str) -> None:
        self.events.append(("abandon_uploads", path))
        super().abandon_uploads(path)


def test_nothing_saved_is_nothing_found(storage: Storage) -> None:
    assert restored(storage) is None
    Run(storage).begin()
    assert restored(storage) is None


def test_what_is_committed_is_found_as_it_was(storage: Storage) -> None:
    report = Run(storage).begin().save(5, position={"step": 5})
    found = restore(storage)
    assert found is not None
    assert found.report == report
    assert found.manifest == manifest(1, 5, {"position": {"step": 5}})
    assert report.uri == f"{storage.uri}/{found.name}"
    assert report.committed_time is not None


def test_the_newest_are_kept_and_the_newest_is_offered_first(storage: Storage) -> None:
    run = Run(storage, keep=2).begin()
    for step in (1, 2, 3, 10):
        run.save(step)
    assert places(storage) == [(1, 3), (1, 10)]
    assert steps_offered(run.archive) == [10, 3]


def test_a_newer_attempts_is_newer_whatever_its_step(storage: Storage) -> None:
    Run(storage, attempt=1).begin().save(9)
    Run(storage, attempt=2).begin().save(4)
    assert restored(storage) == (2, 4)


def test_two_saves_of_one_step_never_share_a_directory(storage: Storage) -> None:
    run = Run(storage).begin()
    assert run.save(1).uri != run.save(1).uri


def test_what_has_no_marker_is_not_offered_and_not_loaded(storage: Storage) -> None:
    archive = Run(storage).begin().archive
    name = archive.new_name(3)
    write_files(storage, name, 1, 3)
    storage.write(f"{name}/manifest.json", manifest(1, 3).dump())
    assert restored(storage) is None
    with pytest.raises(DamagedCheckpoint, match="a file is missing"):
        archive.load(name)


def test_older_ones_go_only_after_the_newer_one_is_committed_and_their_marker_first(tmp_path: Path) -> None:
    storage = RecordingStorage(str(tmp_path))
    run = Run(storage, keep=1).begin()
    old = run.save(1).uri.rpartition("/")[2]
    storage.events.clear()
    new = run.save(2).uri.rpartition("/")[2]
    assert storage.events[-4:] == [
        ("create", f"{new}/{COMMITTED}"),
        ("remove", f"{old}/{COMMITTED}"),
        ("remove", old),
        ("abandon_uploads", old),
    ]


def test_all_of_it_holds_on_s3(s3: FaultyStore) -> None:
    storage = Storage("s3://bucket/job")
    first = Run(storage, attempt=1, keep=2).begin()
    for step in (1, 2):
        first.save(step)
    given_up, under_way = (f"{first.archive.new_name(step)}/rank-00000.safetensors" for step in (1, 9))
    for path in (given_up, under_way):  # no listing shows what S3 holds of them
        storage.upload(path, PART_BYTES + 1).put(PART_BYTES, memoryview(b"1"))
    first.save(3)
    assert storage.unfinished() == [under_way.partition("/")[0]]
    assert places(storage) == [(1, 2), (1, 3)]
    second = Run(storage, attempt=2, keep=2).begin()
    with pytest.raises(PeerLost):
        first.save(5)
    name = second.archive.new_name(4)
    write_files(storage, name, 2, 4)
    report = second.archive.commit(name, manifest(2, 4))
    assert second.archive.commit(name, manifest(2, 4)) == report
    second.archive.prune()
    assert places(storage) == [(1, 3), (2, 4)]
    assert storage.unfinished() == []
    storage.write(f"{name}/rank-00001.safetensors", b"")
    assert restored(storage) == (1, 3)
    second.save(6)
    assert places(storage) == [(1, 3), (2, 6)]
    assert storage.names("attempts") == ["attempt-000002"]


# Older attempts


def test_an_older_attempt_commits_nothing_once_a_newer_one_has_begun(storage: Storage) -> None:
    older, newer = Run(storage, attempt=1).begin(), Run(storage, attempt=2)
    older.save(1)
    newer.begin()
    with pytest.raises(PeerLost, match="attempt 2 has begun, so attempt 1 commits nothing more"):
        older.save(2)
    assert places(storage) == [(1, 1)]
    newer.save(2)
    assert places(storage) == [(1, 1), (2, 2)]


@pytest.mark.parametrize("newer_commits", ["before", "after", "never"])
def test_an_older_attempt_that_passed_the_check_in_time_displaces_nothing(tmp_path: Path, newer_commits: str) -> None:
    """It looked just before the newer one began, and commits after that."""
    newer = Run(Storage(str(tmp_path)), attempt=2, keep=2)

    def save_twice() -> None:
        newer.save(4)
        newer.save(5)

    class SlowStorage(Storage):
        def create(self, path: str, data: bytes) -> None:
            if path.endswith(COMMITTED) and "step-000000000009" in path:
                newer.begin()
                if newer_commits == "before":
                    save_twice()
            super().create(path, data)

    storage = SlowStorage(str(tmp_path))
    older = Run(storage, attempt=1, keep=1).begin()
    older.save(1)
    older.save(9)
    if newer_commits == "after":
        save_twice()
    with pytest.raises(PeerLost):
        older.save(10)
    expected = [(1, 9)] if newer_commits == "never" else [(2, 4), (2, 5)]
    assert places(storage) == expected
    assert restored(storage) == expected[-1]


def test_an_older_attempt_cannot_overwrite_a_newer_ones_checkpoint_of_the_same_step(storage: Storage) -> None:
    older, newer = Run(storage, attempt=1, keep=9).begin(), Run(storage, attempt=2, keep=9)
    older.save(4)
    newer.save(4)
    with pytest.raises(PeerLost):
        older.save(4)
    assert places(storage) == [(1, 4), (2, 4)]
    assert restored(storage) == (2, 4)


def test_a_dead_attempts_unfinished_save_stays_until_the_next_one_has_committed(storage: Storage) -> None:
    older = Run(storage, attempt=1).begin()
    older.save(1)
    unfinished = older.archive.new_name(2)
    write_files(storage, unfinished, 1, 2)
    newer = Run(storage, attempt=2).begin()
    assert restored(storage) == (1, 1)
    assert places(storage) == [(1, 1), (1, 2)]
    newer.save(2)
    assert places(storage) == [(1, 1), (2, 2)]


def test_a_save_that_is_being_written_while_an_earlier_one_commits_is_left_alone(storage: Storage) -> None:
    run = Run(storage, keep=1).begin()
    under_way = run.archive.new_name(8)
    write_files(storage, under_way, 1, 8)
    run.save(4)
    assert places(storage) == [(1, 4), (1, 8)]
    run.archive.commit(under_way, manifest(1, 8))
    run.archive.prune()
    assert places(storage) == [(1, 8)]


def test_an_attempt_that_commits_removes_the_claims_of_older_ones(storage: Storage) -> None:
    for attempt in (1, 2, 3):
        Run(storage, attempt).begin()
    assert len(storage.names("attempts")) == 3
    Run(storage, attempt=3).save(1)
    assert storage.names("attempts") == ["attempt-000003"]


# Listings that lag


def test_checkpoints_that_no_listing_shows_are_found(tmp_path: Path) -> None:
    storage = BlindStorage(str(tmp_path))
    first = Run(storage, attempt=1).begin()
    for step in (1, 2):
        first.save(step)
    assert steps_offered(Run(storage, attempt=2).archive) == [2, 1]
    second, third = Run(storage, attempt=2).begin(), Run(storage, attempt=3).begin()
    assert restored(storage, attempt=3) == (1, 2)
    with pytest.raises(PeerLost):
        second.save(3)
    third.save(3)
    assert restored(storage, attempt=4) == (3, 3)


def test_a_listing_that_shows_only_older_ones_hides_no_newer_one(tmp_path: Path) -> None:
    storage = BlindStorage(str(tmp_path))
    run = Run(storage, attempt=1, keep=2).begin()
    run.save(1)
    storage.look()
    run.save(2)
    run.save(3)  # the listing still shows step 1, though it is gone now
    assert places(storage) == [(1, 2), (1, 3)]
    assert steps_offered(Run(storage, attempt=2).archive) == [3, 2]


def test_a_commit_that_a_listing_hides_is_never_taken_for_an_unfinished_save(tmp_path: Path) -> None:
    """The directory shows, its marker does not yet."""

    class MarkerlessStorage(Storage):
        def names(self, path: str = "") -> list[str]:
            return [name for name in super().names(path) if name != COMMITTED]

    storage = MarkerlessStorage(str(tmp_path))
    run = Run(storage, keep=3).begin()
    for step in (1, 2, 3):
        run.save(step)
    assert places(storage) == [(1, 1), (1, 2), (1, 3)]


def test_hints_of_saves_that_failed_do_not_push_out_those_that_did_not(tmp_path: Path) -> None:
    class StubbornStorage(BlindStorage):
        is_full = False

        def create(self, path: str, data: bytes) -> None:
            if self.is_full and path.endswith(COMMITTED):
                raise StorageError("no space left there")
            super().create(path, data)

    storage = StubbornStorage(str(tmp_path))
    run = Run(storage, keep=1).begin()
    run.save(1)
    storage.is_full = True
    for step in (2, 3, 4):
        with pytest.raises(StorageError):
            run.save(step)
    assert restored(storage, attempt=2) == (1, 1)


# Damage and refusal


def test_a_damaged_one_never_pushes_out_a_whole_one(storage: Storage) -> None:
    first = Run(storage, attempt=1, keep=2).begin()
    first.save(1)
    name = first.save(6).uri.rpartition("/")[2]
    storage.write(f"{name}/rank-00000.safetensors", b"")
    told: list[str] = []
    assert restored(storage, told) == (1, 1)
    assert told == [f"passed over {storage.uri}/{name}: rank-00000.safetensors has 0 bytes instead of 137"]
    Run(storage, attempt=2, keep=2).begin().save(3)
    assert places(storage) == [(1, 1), (2, 3)]


def test_an_answer_that_was_lost_is_no_failed_commit(tmp_path: Path) -> None:
    """The store wrote the marker, the connection broke, and the second try finds it there."""

    class ForgetfulStorage(Storage):
        def create(self, path: str, data: bytes) -> None:
            super().create(path, data)
            super().create(path, data)

    storage = ForgetfulStorage(str(tmp_path))
    report = Run(storage).begin().save(1)
    found = restore(storage)
    assert found is not None
    assert found.report == report


def test_a_name_that_another_checkpoint_took_is_never_overwritten(storage: Storage) -> None:
    archive = Run(storage).begin().archive
    name = archive.new_name(1)
    write_files(storage, name, 1, 1)
    report = archive.commit(name, manifest(1, 1))
    assert archive.commit(name, manifest(1, 1)) == report
    with pytest.raises(StorageError, match=r"manifest\.json is there already, with another content"):
        archive.commit(name, manifest(1, 1, {"another": True}))
    assert restored(storage) == (1, 1)


@pytest.mark.parametrize("refusal", [StorageError("the store is busy"), ConfigError("deleting is forbidden")])
def test_a_store_that_refuses_to_clean_up_stops_nothing(
    tmp_path: Path, refusal: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    class HoardingStorage(Storage):
        def remove(self, path: str) -> None:
            raise refusal

    run = Run(HoardingStorage(str(tmp_path)), keep=1).begin()
    run.save(1)
    run.save(2)
    assert [record.message for record in caplog.records] == [f"cannot clean up {tmp_path}: {refusal}"]
    Run(Storage(str(tmp_path)), keep=1).save(3)
    assert places(Storage(str(tmp_path))) == [(1, 3)]


def test_another_runs_checkpoints_are_found_by_either_uri(storage: Storage) -> None:
    run = Run(storage, keep=9).begin()
    uris = {step: run.save(step).uri for step in (1, 2)}
    for uri, step in ((storage.uri, None), (storage.uri + "/latest", None), (uris[1], 1), (uris[2] + "/", 2)):
        archive, name = open_other(uri)
        assert steps_offered(archive) == [2, 1]
        assert (name and archive.load(name).manifest.step) == step
