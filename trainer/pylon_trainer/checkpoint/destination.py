"""One place that checkpoints are written to, the store or the nodes' disks: from the first part to the commit.

Saves are committed in the order in which they began. Every step the ranks add up how far they are with the oldest one,
and so move together without a word of their own: when all ranks' files are durable they tell each other the checksums,
and whoever commits here has its writer do so; when one rank cannot write, all give that save up. Nothing here waits.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pylon_api.run import CheckpointReport
from pylon_trainer.checkpoint.manifest import FileEntry, Manifest
from pylon_trainer.checkpoint.orders import Committed, Durable, End, Failed
from pylon_trainer.checkpoint.shelf import Shelf
from pylon_trainer.checkpoint.staged import Staged
from pylon_trainer.checkpoint.writer_handle import WriterHandle
from pylon_trainer.errors import TrainerError
from pylon_trainer.runtime.distributed import World


@dataclass(slots=True, eq=False)
class Save:
    """One state on its way, as this rank sees it."""

    step: int
    name: str
    """Of its directory, the same everywhere."""
    file: str
    size_bytes: int
    replicated: dict[str, Any]
    own: dict[str, Any]
    begin_time: float
    """By time.monotonic."""
    staged: Staged | None = None
    error: TrainerError | None = None
    """Why this rank has nothing to write."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a save ended, the same on every rank."""

    save: Save
    report: CheckpointReport
    """What was committed; in full on a rank that did."""
    error: TrainerError | None
    """Why nothing was: the save was given up."""

    is_in_store: bool
    """Whether it was for the store, and not for the nodes' disks."""
    seconds: float
    """From its beginning."""


@dataclass(slots=True)
class _UnderWay:
    save: Save
    upload: int
    is_committing: bool = False
    answer: End | None = None
    """The writer's, to the file or then to the commit."""


@dataclass(frozen=True, slots=True)
class _Receipt:
    """What one rank says of its file once it is durable."""

    file: str
    entry: FileEntry
    own: dict[str, Any]


class Destination:
    """Of one rank's saves; each call is made by all ranks alike."""

    def __init__(self, world: World, writer: WriterHandle, shelf: Shelf) -> None:
        """shelf: where it is. A rank that lists there commits, for all ranks or for its node."""
        self.is_store = shelf.is_shared
        self._world = world
        self._writer = writer
        self._archive = shelf.archive
        self._uri = shelf.archive.storage.uri
        self._commits = shelf.lists
        self._queue: deque[_UnderWay] = deque()

    @property
    def under_way(self) -> int:
        """Saves that are neither committed nor given up."""
        return len(self._queue)

    def begin(self, save: Save, upload: int) -> None:
        """Have the writer expect a save's parts under this number, never used before."""
        self._writer.begin(upload, self._uri, f"{save.name}/{save.file}", save.size_bytes)
        self._queue.append(_UnderWay(save, upload))

    def receive(self, end: End) -> None:
        """What the writer says of some file or commit, perhaps one of these."""
        for one in self._queue:
            if one.upload == end.upload:
                one.answer = end

    def votes(self) -> list[int]:
        """Whether this rank has done its part of what the oldest save now needs, and whether it failed; to be added up
        over all ranks."""
        if not self._queue:
            return [0, 0]
        oldest = self._queue[0]
        if self._error(oldest) is not None:
            return [0, 1]
        if oldest.is_committing:
            return [int(isinstance(oldest.answer, Committed) or not self._commits), 0]
        return [int(isinstance(oldest.answer, Durable)), 0]

    def heed(self, done: int, failed: int) -> Outcome | None:
        """Go on by all ranks' votes. Collective; returns how the oldest save ended when it did."""
        if failed:
            return self._give_up()
        if done < self._world.size:
            return None
        oldest = self._queue[0]
        if not oldest.is_committing:
            self._commit(oldest)
            return None
        return self._end(oldest, None)

    def abandon(self) -> None:
        """Give up all that is under way; what is half written stays for a later attempt to clean up."""
        while self._queue:
            self._writer.cancel(self._queue.popleft().upload)

    def _commit(self, oldest: _UnderWay) -> None:
        save, answer = oldest.save, oldest.answer
        assert isinstance(answer, Durable)
        receipts = self._world.gather(_Receipt(save.file, answer.entry, save.own))
        manifest = self._manifest(save, receipts)
        if not self.is_store:
            # Alike on all ranks but for measured times, and nodes that share a disk must commit the same.
            manifest = self._world.broadcast(manifest)
        oldest.is_committing, oldest.answer = True, None
        if self._commits:
            archive = self._archive
            self._writer.commit(oldest.upload, self._uri, archive.attempt, archive.keep, save.name, manifest)

    def _manifest(self, save: Save, receipts: Sequence[_Receipt]) -> Manifest:
        return Manifest(
            step=save.step,
            attempt=self._archive.attempt,
            ranks=self._world.size,
            files={receipt.file: receipt.entry for receipt in receipts},
            replicated=save.replicated,
            own=[receipt.own for receipt in receipts],
        )

    def _give_up(self) -> Outcome:
        """The oldest save, on all ranks, for the reason of the first that has one."""
        oldest = self._queue[0]
        errors = self._world.gather(self._error(oldest))
        self._writer.cancel(oldest.upload)
        # Another node may have committed it, and removed older ones: all files are there, so it can be restored.
        may_count = oldest.is_committing and not self.is_store
        if self._commits and not may_count:
            self._writer.discard(self._uri, self._archive.attempt, self._archive.keep, oldest.save.name)
        return self._end(oldest, next(error for error in errors if error is not None))

    def _error(self, one: _UnderWay) -> TrainerError | None:
        """Why this rank cannot go on with a save."""
        if one.save.error is not None:
            return one.save.error
        staged, answer = one.save.staged, one.answer
        if staged is not None and staged.error is not None:
            error = staged.error
            return error if isinstance(error, TrainerError) else TrainerError(f"cannot copy a checkpoint: {error!r}")
        return answer.error() if isinstance(answer, Failed) else None

    def _end(self, oldest: _UnderWay, error: TrainerError | None) -> Outcome:
        self._queue.popleft()
        save, answer = oldest.save, oldest.answer
        report = CheckpointReport(step=save.step, attempt=self._archive.attempt, uri=f"{self._uri}/{save.name}")
        if isinstance(answer, Committed):
            report = answer.report
        return Outcome(save, report, error, self.is_store, time.monotonic() - save.begin_time)
