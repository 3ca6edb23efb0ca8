"""The checkpoints under one directory, as one attempt sees them: at every moment the newest committed one is whole.

Each lies in a directory of its own: its ranks' files, a manifest, and last one small marker. Nothing is renamed or
overwritten. Only what has a valid marker is ever offered, and older checkpoints go only after a newer one is durable.
Listings may lag, so whatever decides is read by its name. Which state goes in, and what ranks agree on, is not decided
here; neither are the ranks' files written here.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from pylon_api.run import CheckpointReport
from pylon_trainer.checkpoint.claims import CLAIMS, Claims
from pylon_trainer.checkpoint.manifest import COMMITTED, MANIFEST, DamagedCheckpoint, Manifest, Marker, checksum
from pylon_trainer.checkpoint.second_look import confirmed
from pylon_trainer.checkpoint.storage import Storage
from pylon_trainer.errors import ConfigError, StorageError

logger = logging.getLogger("pylon")

_NAME = re.compile(r"step-(?P<step>\d{12})-attempt-(?P<attempt>\d{6})-[0-9a-f]{8}")
_DAMAGED = "DAMAGED"
"""Left in a committed checkpoint that proved damaged, with the reason."""


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A checkpoint's directory. A newer attempt's is greater whatever its step: it knew of the older ones' and went on
    from the newest whole one."""

    attempt: int
    step: int
    name: str

    @classmethod
    def parse(cls, name: str) -> Place | None:
        """None when that is no name of a checkpoint."""
        match = _NAME.fullmatch(name)
        return cls(int(match["attempt"]), int(match["step"]), name) if match else None


@dataclass(frozen=True, slots=True)
class Listed:
    """A checkpoint as a listing has it."""

    place: Place
    is_committed: bool

    @property
    def name(self) -> str:
        return self.place.name


@dataclass(frozen=True, slots=True)
class Found:
    """A committed checkpoint whose manifest is whole; its files are yet to be read."""

    name: str
    manifest: Manifest
    report: CheckpointReport


class Archive:
    """Finds, commits and removes checkpoints; keeps nothing in memory, so that several may serve one attempt.

    Saves of one attempt commit in the order of their steps: what is unfinished and older than a committed one has been
    given up.
    """

    def __init__(self, storage: Storage, attempt: int, keep: int) -> None:
        self.storage = storage
        self.attempt = attempt
        self.keep = keep
        self._claims = Claims(storage, attempt)

    def claim(self) -> None:
        """Leave word that this attempt has begun, so that an older one which still runs commits nothing more."""
        self._claims.write(self._hinted())

    def new_name(self, step: int, nonce: int | None = None) -> str:
        """A directory that no other save will ever use, not even one of the same step and attempt.

        nonce: 32 bits that ranks agreed on, so that all come to the same name.
        """
        return f"step-{step:012d}-attempt-{self.attempt:06d}-{secrets.randbits(32) if nonce is None else nonce:08x}"

    def commit(self, name: str, manifest: Manifest) -> CheckpointReport:
        """Make a checkpoint count whose files are all durable.

        PeerLost when a newer attempt has begun, StorageError when the store refuses: then `discard` removes its files.
        """
        content = manifest.dump()
        self._write_once(f"{name}/{MANIFEST}", content)
        # Before the marker: hinting at what is not committed does no harm, not hinting at what is might lose it.
        self._claims.write([name, *self._hinted()])
        self._claims.refuse_if_superseded()
        marker = Marker(checksum(content), datetime.now(UTC))
        try:
            self.storage.create(f"{name}/{COMMITTED}", marker.dump())
        except FileExistsError:
            return self._committed_already(name)
        return self._report(name, manifest, marker)

    def prune(self) -> None:
        """After a commit: keep the newest whole ones and remove the others, as far as the store lets us.

        What stays does no harm, and the next call tries again.
        """
        with _told_not_raised(f"cannot clean up {self.storage.uri}"):
            for superfluous in self.superfluous():
                self.remove(superfluous.name)
            self._claims.remove_older()

    def superfluous(self) -> list[Listed]:
        """What is older than the newest committed and whole ones that are to be kept, or damaged, or was given up.

        Never anything of a newer attempt, and never anything newer than the newest whole one.
        """
        kept, found = 0, []
        listings = self.checkpoints()
        hidden = _places(set(self._begun()) - {listed.name for listed in listings})
        listings += [Listed(place, is_committed=False) for place in hidden]
        for listed in sorted(listings, key=lambda one: one.place, reverse=True):
            if listed.is_committed and kept < self.keep and self._is_whole(listed.name):
                kept += 1
            elif kept > 0 and listed.place.attempt <= self.attempt:
                found.append(listed)
        return found

    def discard(self, name: str) -> None:
        """Remove what there is of a save that was given up, as far as the store lets us."""
        with _told_not_raised(f"cannot remove {self.storage.uri}/{name}"):
            self.remove(name)

    def remove(self, name: str) -> None:
        """Remove a checkpoint. The marker goes first, so that a removal cut short leaves nothing that looks whole."""
        self.storage.remove(f"{name}/{COMMITTED}")
        self.storage.remove(name)
        with _told_not_raised(f"cannot drop unfinished uploads below {self.storage.uri}/{name}"):
            self.storage.abandon_uploads(name)

    def condemn(self, name: str, reason: str) -> None:
        """Note that a file of this one proved damaged, so that it never pushes out a whole one."""
        with _told_not_raised(f"cannot note the damage of {self.storage.uri}/{name}"):
            self.storage.write(f"{name}/{_DAMAGED}", reason.encode())

    def checkpoints(self) -> list[Listed]:
        """All that are listed, committed or not, and all committed ones that were hinted at; newest first."""
        names = self.storage.names()
        listed = [Listed(place, self._is_committed(place.name)) for place in _places(names)]
        hinted = [Listed(place, True) for place in _places(set(self._hinted()) - set(names))]
        return sorted(listed + hinted, key=lambda one: one.place, reverse=True)

    def load(self, name: str) -> Found:
        """What a committed checkpoint's manifest tells.

        DamagedCheckpoint unless there are a valid marker and the manifest that it names.
        """
        return confirmed(self.storage, lambda: self._load(name))

    def damage_of(self, name: str) -> str | None:
        """Why a checkpoint was condemned; None when it was not."""
        try:
            return self.storage.read(f"{name}/{_DAMAGED}").decode(errors="replace")
        except FileNotFoundError:
            return None

    def _load(self, name: str) -> Found:
        try:
            marker = Marker.parse(self.storage.read(f"{name}/{COMMITTED}"))
            content = self.storage.read(f"{name}/{MANIFEST}")
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"a file is missing: {error}") from error
        if checksum(content) != marker.manifest_checksum:
            raise DamagedCheckpoint(f"checksum of {MANIFEST} differs")
        manifest = Manifest.parse(content)
        return Found(name, manifest, self._report(name, manifest, marker))

    def _write_once(self, path: str, content: bytes) -> None:
        """It may be there already, from a node of this job that shares the disk. StorageError for another content."""
        try:
            self.storage.create(path, content)
        except FileExistsError:
            if self.storage.read(path) != content:
                raise StorageError(f"{self.storage.uri}/{path} is there already, with another content") from None

    def _committed_already(self, name: str) -> CheckpointReport:
        """For a marker that was there: that of a node of this job that shares the disk and was faster."""
        try:
            return self.load(name).report
        except DamagedCheckpoint as damage:
            raise StorageError(f"{self.storage.uri}/{name} cannot be committed: {damage}") from damage

    def _begun(self) -> list[str]:
        """Names that hold unfinished uploads, as far as this job may know."""
        with _told_not_raised(f"cannot list unfinished uploads below {self.storage.uri}"):
            return self.storage.unfinished()
        return []

    def _is_whole(self, name: str) -> bool:
        """As far as that shows without reading its files."""
        try:
            return self.damage_of(name) is None and self.load(name) is not None
        except DamagedCheckpoint:
            return False

    def _is_committed(self, name: str) -> bool:
        return self.storage.size(f"{name}/{COMMITTED}") is not None

    def _report(self, name: str, manifest: Manifest, marker: Marker) -> CheckpointReport:
        return CheckpointReport(
            step=manifest.step,
            attempt=manifest.attempt,
            uri=f"{self.storage.uri}/{name}",
            committed_time=marker.committed_time,
            size_bytes=manifest.size_bytes,
        )

    def _hinted(self) -> list[str]:
        """Committed checkpoints that claims name, newest first, down to the newest attempt that committed any."""
        found: set[Place] = set()
        for attempt, names in self._claims.read():
            hints = {place for place in _places(names) if self._is_committed(place.name)}
            found |= hints
            if any(place.attempt == attempt for place in hints):
                break
        return [place.name for place in sorted(found, reverse=True)[: self.keep]]


def open_other(uri: str) -> tuple[Archive, str | None]:
    """Checkpoints of another run, to look at only: from its directory, or from the directory of a single one.

    Returns the name too when the URI is that of a single one. A last part `latest` is a word for people, as no store
    holds an object of that name that could point at nothing: it means the newest of the directory.
    """
    uri = uri.rstrip("/").removesuffix("/latest")
    parent, _, name = uri.rpartition("/")
    single = _NAME.fullmatch(name) is not None
    return Archive(Storage(parent if single else uri), attempt=0, keep=1), name if single else None


def is_job(names: Iterable[str]) -> bool:
    """Whether a directory with these entries is where a job keeps its checkpoints."""
    return any(name == CLAIMS or _NAME.fullmatch(name) for name in names)


def _places(names: Iterable[str]) -> list[Place]:
    return [place for place in map(Place.parse, names) if place is not None]


@contextmanager
def _told_not_raised(what: str) -> Iterator[None]:
    """For cleaning up: a store that refuses it, or forbids it to this job, is no reason to stop training."""
    try:
        yield
    except (StorageError, ConfigError) as error:
        logger.warning(f"{what}: {error}")
