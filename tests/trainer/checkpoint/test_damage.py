"""A flipped bit, a cut, a missing or longer file: found wherever it is, and the checkpoint before is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from saved_checkpoints import Run, restore

from pylon_trainer.checkpoint.archive import Archive
from pylon_trainer.checkpoint.audit import audit
from pylon_trainer.checkpoint.second_look import LOOKS
from pylon_trainer.checkpoint.storage import Storage

FILES = ["rank-00000.safetensors", "rank-00001.safetensors", "manifest.json", "COMMITTED"]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path), sleep=lambda _: None)


@pytest.fixture
def newest(storage: Storage) -> Path:
    """The directory of the second of two checkpoints."""
    run = Run(storage).begin()
    run.save(1)
    return Path(run.save(2).uri)


def flips(data: bytes) -> Iterator[bytes]:
    """One bit each, spread over all bytes: header, body and end of whatever it is."""
    for number, at in enumerate(sorted({*range(0, len(data), max(1, len(data) // 40)), len(data) - 1})):
        yield bytes([*data[:at], data[at] ^ 1 << number % 8, *data[at + 1 :]])


def cuts(data: bytes) -> Iterator[bytes]:
    for length in sorted({0, 1, 63, 64, 65, len(data) // 2, len(data) - 1}):
        yield data[: min(length, len(data) - 1)]


def growths(data: bytes) -> Iterator[bytes]:
    yield from (data + b"\0", data + b"\n", data + data)


def restored_step(storage: Storage, told: list[str]) -> int | None:
    found = restore(storage, told.append)
    return found and found.manifest.step


@pytest.mark.parametrize("change", [flips, cuts, growths])
@pytest.mark.parametrize("file", FILES)
def test_any_change_to_any_file_falls_back_and_says_where(
    storage: Storage, newest: Path, file: str, change: Callable[[bytes], Iterator[bytes]]
) -> None:
    path = newest / file
    data = path.read_bytes()
    for changed in change(data):
        path.write_bytes(changed)
        told: list[str] = []
        assert restored_step(storage, told) == 1
        (notice,) = told
        assert notice.startswith(f"passed over {newest}: ")
        assert file in notice
    path.write_bytes(data)
    assert restored_step(storage, []) == 2


@pytest.mark.parametrize(("bad_looks", "step"), [(LOOKS - 1, 2), (LOOKS, 1)])
@pytest.mark.parametrize("file", FILES)
def test_only_what_is_bad_in_every_look_is_damaged(
    storage: Storage, newest: Path, monkeypatch: pytest.MonkeyPatch, file: str, bad_looks: int, step: int
) -> None:
    read, read_into, looks = Storage.read, Storage.read_into, []

    def is_spoiled(path: str) -> bool:
        looks.extend([path] * (path == f"{newest.name}/{file}"))
        return path == f"{newest.name}/{file}" and len(looks) <= bad_looks

    def spoiled_read(storage: Storage, path: str) -> bytes:
        data = read(storage, path)
        return data[::-1] if is_spoiled(path) else data

    def spoiled_read_into(storage: Storage, path: str, offset: int, buffer: memoryview) -> None:
        read_into(storage, path, offset, buffer)
        if offset == 0 and is_spoiled(path):
            buffer[0] ^= 1

    monkeypatch.setattr(Storage, "read", spoiled_read)
    monkeypatch.setattr(Storage, "read_into", spoiled_read_into)
    assert restored_step(storage, []) == step


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_gone_falls_back(storage: Storage, newest: Path, file: str) -> None:
    (newest / file).unlink()
    told: list[str] = []
    assert restored_step(storage, told) == 1
    # Without a marker there never was a checkpoint to pass over.
    assert len(told) == (0 if file == "COMMITTED" else 1)


@pytest.mark.parametrize("change", [flips, cuts, growths])
def test_a_damaged_hint_hides_nothing_and_offers_nothing(
    storage: Storage, newest: Path, change: Callable[[bytes], Iterator[bytes]]
) -> None:
    hint = newest.parent / "attempts" / "attempt-000001"
    for changed in change(hint.read_bytes()):
        hint.write_bytes(changed)
        assert restored_step(storage, []) == 2
        assert [listed.place.step for listed in Archive(storage, 3, 2).checkpoints()] == [2, 1]


def test_each_damaged_part_is_named_and_every_byte_counted(storage: Storage, newest: Path) -> None:
    path = newest / "rank-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    data[-1] ^= 1
    path.write_bytes(data)
    (newest / "rank-00000.safetensors").unlink()
    found = Archive(storage, 3, 2).load(newest.name)
    read: list[int] = []
    assert list(audit(storage, found, read.append)) == [
        "rank-00000.safetensors is missing",
        "checksum of rank-00001.safetensors differs in part 0, bytes 0 to 64",
        "checksum of rank-00001.safetensors differs in part 2, bytes 128 to 138",
    ]
    assert sum(read) == len(data)


def test_a_file_that_goes_while_it_is_read_is_told(storage: Storage, newest: Path) -> None:
    class VanishingStorage(Storage):
        def size(self, path: str) -> int | None:
            size_bytes = super().size(path)
            if path.endswith("rank-00001.safetensors"):
                (Path(storage.uri) / path).unlink()
            return size_bytes

    found = Archive(storage, 3, 2).load(newest.name)
    damages = set(audit(VanishingStorage(storage.uri), found))
    assert damages == {"rank-00001.safetensors was removed or cut while it was read"}
