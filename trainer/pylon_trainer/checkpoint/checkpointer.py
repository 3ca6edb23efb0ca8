"""Saves and restores checkpoints so that at every moment the newest committed one is whole.

A save writes its files under a directory of its own, then a manifest, then one small marker; nothing is renamed or
overwritten. Only what has a valid marker is ever restored, and older checkpoints go only after a newer one is durable.
One process writes. Which state goes in, and how ranks agree, is not decided here.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pylon_api.run import CheckpointReport
from pylon_trainer.checkpoint.format import (
    COMMITTED,
    MANIFEST,
    DamagedCheckpoint,
    Manifest,
    checksum,
    pack,
    unpack,
)
from pylon_trainer.checkpoint.storage import Storage
from pylon_trainer.errors import PeerLost, StorageError

_NAME = re.compile(r"step-(?P<step>\d{12})-attempt-(?P<attempt>\d{6})-[0-9a-f]{8}")
_CLAIM = re.compile(r"attempt-(?P<attempt>\d{6})")
_CLAIMS = "attempts"


@dataclass(frozen=True, slots=True, order=True)
class _Place:
    """A checkpoint's directory. A newer attempt's is greater whatever its step: it knew of the older ones' and went on
    from the newest whole one."""

    attempt: int
    step: int
    name: str


class Checkpointer:
    """The checkpoints under one directory, as one attempt sees them."""

    def __init__(self, storage: Storage, attempt: int, keep: int) -> None:
        self._storage = storage
        self._attempt = attempt
        self._keep = keep
        self._damaged: set[str] = set()

    def claim(self) -> None:
        """Leave word that this attempt has begun, so that an older one which still runs commits nothing more."""
        self._storage.write(f"{_CLAIMS}/attempt-{self._attempt:06d}", b"")
        for older in (claim for claim in self._claims() if claim < self._attempt):
            self._storage.remove(f"{_CLAIMS}/attempt-{older:06d}")

    def save(self, step: int, state: Mapping[str, Any]) -> CheckpointReport:
        """Write, commit, then remove what is no longer needed.

        StorageError when the store refuses: what was written of this one is removed, older ones are untouched.
        PeerLost when a newer attempt has begun.
        """
        name = f"step-{step:012d}-attempt-{self._attempt:06d}-{secrets.token_hex(4)}"
        files = pack(state)
        manifest = Manifest.of(step, self._attempt, files)
        try:
            for file, data in files.items():
                self._storage.write(f"{name}/{file}", data)
            self._storage.write(f"{name}/{MANIFEST}", manifest.dump())
            self._refuse_if_superseded()
            committed_time = self._commit(name, manifest)
        except (StorageError, PeerLost):
            self._remove_quietly(name)
            raise
        self._remove_old()
        return self._report(name, manifest, committed_time)

    def restore(
        self, passed_over: Callable[[str], None], step: int | None = None
    ) -> tuple[dict[str, Any], CheckpointReport] | None:
        """The newest whole checkpoint, or that of a given step; None when none was ever committed.

        passed_over: told, in one line each, of committed checkpoints that are damaged.
        StorageError when all are damaged, because beginning anew would lose them silently.
        """
        damaged = ""
        for place in sorted(self._places(), reverse=True):
            if step not in (None, place.step) or COMMITTED not in self._storage.names(place.name):
                continue
            try:
                return self._load(place.name)
            except DamagedCheckpoint as damage:
                damaged = f"{self._storage.uri}/{place.name}: {damage}"
                self._damaged.add(place.name)
                passed_over(f"passed over {damaged}")
        if damaged:
            raise StorageError(f"no checkpoint is whole ({damaged}); remove {self._storage.uri} to begin anew")
        return None

    def _load(self, name: str) -> tuple[dict[str, Any], CheckpointReport]:
        try:
            marker = json.loads(self._storage.read(f"{name}/{COMMITTED}"))
            data = self._storage.read(f"{name}/{MANIFEST}")
            if checksum(data) != marker["manifest_xxh3_128"]:
                raise DamagedCheckpoint(f"checksum of {MANIFEST} differs")
            manifest = Manifest.parse(data)
            files = {file: self._storage.read(f"{name}/{file}") for file in manifest.files}
            committed_time = datetime.fromisoformat(marker["committed_time"])
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"a file is missing: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedCheckpoint(f"{COMMITTED} does not parse") from error
        for file, content in files.items():
            manifest.verify(file, content)
        return unpack(files), self._report(name, manifest, committed_time)

    def _commit(self, name: str, manifest: Manifest) -> datetime:
        committed_time = datetime.now(UTC)
        marker = {
            "manifest_xxh3_128": checksum(manifest.dump()),
            "committed_time": committed_time.isoformat(),
        }
        self._storage.write(f"{name}/{COMMITTED}", json.dumps(marker).encode())
        return committed_time

    def _report(self, name: str, manifest: Manifest, committed_time: datetime) -> CheckpointReport:
        return CheckpointReport(
            step=manifest.step,
            uri=f"{self._storage.uri}/{name}",
            committed_time=committed_time,
            size_bytes=manifest.size_bytes,
        )

    def _refuse_if_superseded(self) -> None:
        newest = max(self._claims(), default=self._attempt)
        if newest > self._attempt:
            raise PeerLost(f"attempt {newest} has begun, so attempt {self._attempt} commits nothing more")

    def _claims(self) -> list[int]:
        return [int(match["attempt"]) for match in map(_CLAIM.fullmatch, self._storage.names(_CLAIMS)) if match]

    def _remove_old(self) -> None:
        """Keep the newest committed and whole ones; of the others, those that no newer attempt is writing go."""
        kept = 0
        for place in sorted(self._places(), reverse=True):
            is_whole = place.name not in self._damaged and COMMITTED in self._storage.names(place.name)
            if is_whole and kept < self._keep:
                kept += 1
            elif place.attempt <= self._attempt:
                self._remove_quietly(place.name)

    def _remove_quietly(self, name: str) -> None:
        """Clean up as far as the store lets us: what stays is harmless and the next save tries again."""
        try:
            # The marker goes first, so that a removal cut short leaves nothing that looks committed.
            self._storage.remove(f"{name}/{COMMITTED}")
            self._storage.remove(name)
        except StorageError:
            return

    def _places(self) -> list[_Place]:
        return [
            _Place(int(match["attempt"]), int(match["step"]), match[0])
            for match in map(_NAME.fullmatch, self._storage.names())
            if match
        ]


def open_other(uri: str) -> tuple[Checkpointer, int | None]:
    """Checkpoints of another run, to read only: from its directory, or from the directory of a single one.

    Returns the step too when the URI names a single one.
    """
    parent, _, name = uri.rstrip("/").rpartition("/")
    single = _NAME.fullmatch(name)
    storage = Storage(parent if single else uri)
    return Checkpointer(storage, attempt=0, keep=1), int(single["step"]) if single else None
