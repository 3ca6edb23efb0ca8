"""Checkpoints of known bytes for tests of what happens to them in a store; no tensors, no torch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from pylon_api.run import CheckpointReport
from pylon_trainer.checkpoint.archive import Archive, Found
from pylon_trainer.checkpoint.audit import audit
from pylon_trainer.checkpoint.manifest import DamagedCheckpoint, FileEntry, Manifest, checksum
from pylon_trainer.checkpoint.storage import Storage
from pylon_trainer.errors import PeerLost, StorageError

PART_BYTES = 64
RANKS = 2


def rank_files(attempt: int, step: int) -> dict[str, bytes]:
    """One file per rank, of several parts, the last one short; another content for every attempt and step."""
    return {
        f"rank-{rank:05d}.safetensors": random.Random(f"{attempt} {step} {rank}").randbytes(2 * PART_BYTES + 9 + rank)
        for rank in range(RANKS)
    }


def file_entry(data: bytes) -> FileEntry:
    parts = (data[offset : offset + PART_BYTES] for offset in range(0, len(data), PART_BYTES))
    return FileEntry(len(data), PART_BYTES, tuple(map(checksum, parts)))


def manifest(attempt: int, step: int, replicated: dict[str, Any] | None = None) -> Manifest:
    files = {name: file_entry(data) for name, data in rank_files(attempt, step).items()}
    own = [{"data": {"epoch": step, "rank": rank}} for rank in range(RANKS)]
    return Manifest(step, attempt, RANKS, files, replicated or {"position": {"step": step, "name": "é"}}, own)


def write_files(storage: Storage, name: str, attempt: int, step: int) -> None:
    """What the ranks' writers do before a commit."""
    for file, data in rank_files(attempt, step).items():
        upload = storage.upload(f"{name}/{file}", len(data))
        upload.put(0, memoryview(data))
        upload.finish()


class Run:
    """One attempt that saves."""

    def __init__(self, storage: Storage, attempt: int = 1, keep: int = 2) -> None:
        self.archive = Archive(storage, attempt, keep)
        self.attempt = attempt

    def begin(self) -> Run:
        self.archive.claim()
        return self

    def save(self, step: int, **replicated: Any) -> CheckpointReport:
        """Files, commit, prune; a save that fails is discarded."""
        name = self.archive.new_name(step)
        try:
            write_files(self.archive.storage, name, self.attempt, step)
            report = self.archive.commit(name, manifest(self.attempt, step, replicated))
        except (StorageError, PeerLost):
            self.archive.discard(name)
            raise
        self.archive.prune()
        return report


def offered(archive: Archive, told: Callable[[str], None]) -> Iterator[Found]:
    """What a restore would be offered, newest first; told of what is damaged already by its manifest."""
    for listed in archive.checkpoints():
        if listed.is_committed:
            try:
                yield archive.load(listed.name)
            except DamagedCheckpoint as damage:
                told(f"passed over {archive.storage.uri}/{listed.name}: {damage}")


def restore(storage: Storage, told: Callable[[str], None] = lambda _: None, attempt: int = 3) -> Found | None:
    """The newest whole checkpoint, every byte of it read and compared with what was saved."""
    archive = Archive(storage, attempt, keep=2)
    for found in offered(archive, told):
        damages = list(audit(storage, found))
        if damages:
            archive.condemn(found.name, damages[0])
            told(f"passed over {found.report.uri}: {damages[0]}")
            continue
        for file, data in rank_files(found.manifest.attempt, found.manifest.step).items():
            assert storage.read(f"{found.name}/{file}") == data
        return found
    return None


def places(storage: Storage) -> list[tuple[int, int]]:
    """Attempt and step of every checkpoint's directory, committed or not, in order."""
    names = [name.split("-") for name in Storage(storage.uri).names() if name.startswith("step-")]
    return sorted((int(name[3]), int(name[1])) for name in names)
