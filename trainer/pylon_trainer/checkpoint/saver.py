"""Saves and restores a run, with all ranks taking part, while training goes on.

Every step all ranks add up a few integers (`votes`), as they do anyway to agree on stopping: what rank 0 finds due,
whether memory is free everywhere, how far the saves under way are. So all know alike what begins at the end of the step
and what is committed (`heed`), and nobody waits for anybody. A save that fails is given up by all and training goes on;
only the last one must not fail. When to save is pace.py's to say, what goes in contents.py's.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections.abc import Sequence
from typing import Any

from pylon_api.run import SaveReport, TrainerPhase
from pylon_api.training import CheckpointSpec
from pylon_trainer.checkpoint import contents
from pylon_trainer.checkpoint.archive import Archive
from pylon_trainer.checkpoint.destination import Destination, Outcome, Save
from pylon_trainer.checkpoint.manifest import PART_BYTES
from pylon_trainer.checkpoint.pace import Pace
from pylon_trainer.checkpoint.policy import Reach, next_move
from pylon_trainer.checkpoint.restore import Shelf
from pylon_trainer.checkpoint.resume import resume
from pylon_trainer.checkpoint.share import Divider, Share
from pylon_trainer.checkpoint.slab import Slabs, default_budget_bytes
from pylon_trainer.checkpoint.staging import Staging
from pylon_trainer.checkpoint.storage import Storage
from pylon_trainer.checkpoint.writer_handle import WriterHandle
from pylon_trainer.errors import ConfigError, PeerLost, Stopped, StorageError
from pylon_trainer.run import Run
from pylon_trainer.runtime.signals import StopFlag
from pylon_trainer.status import Board

EXIT_MARGIN_SECONDS = 8
"""What is kept of the pod's grace for leaving, once the last checkpoint is committed or given up."""

MAX_UNDER_WAY = 2
"""Saves on their way to one place; another waits, memory or not."""

CLOSE_SECONDS = 5

POLL_SECONDS = 0.02

logger = logging.getLogger("pylon")


class Saver:
    """The checkpoints of one run; does nothing when the run has none. Each method is called by all ranks alike."""

    def __init__(self, run: Run, board: Board, stop: StopFlag, grace_seconds: float) -> None:
        """Takes the memory for checkpoints, and starts what writes them. Collective.

        grace_seconds: between a request to stop and the end of this process.
        """
        self._run = run
        self._board = board
        self._stop = stop
        self._grace_seconds = max(1.0, grace_seconds - EXIT_MARGIN_SECONDS)
        self._spec = run.config.training.checkpoint
        self._report = SaveReport()
        self._begins, self._waits, self._nonce = Reach.NOWHERE, Reach.NOWHERE, 0
        self._newest_step: int | None = None
        """Of the last checkpoint for the store that has begun, or that this run goes on from."""
        self._ended: Outcome | None = None
        """How the last save for the store ended."""
        self._was_quiet = True
        self._stall_seconds: float | None = None
        """Of a save whose tensors are still being copied."""
        self._destinations: list[Destination] = []
        if self._spec is not None:
            self._open(self._spec)

    def _open(self, spec: CheckpointSpec) -> None:
        config, world = self._run.config, self._run.world
        attempt, is_first_of_node = config.attempt, world.rank % config.processes_per_node == 0
        self._divider = Divider(world.rank, world.size)
        self._slabs = _open_slabs(self._share().layout.size_bytes, spec, self._run)
        for line in self._slabs.notices:
            self._notice(line)
        store, local = config.checkpoint_directory, config.local_checkpoint_directory
        places = [(store, spec.keep, world.rank == 0, True)] if store is not None else []
        if spec.local is not None and local is not None:  # the nearest first
            places.insert(0, (local, spec.local.keep, is_first_of_node, False))
        self._writer = WriterHandle.open(self._slabs.arena, [directory for directory, *_ in places])
        self._staging = Staging(world.device, self._slabs, self._writer)
        self._uploads = itertools.count()
        self._shelves: list[Shelf] = []
        for directory, keep, commits, is_store in places:
            archive = Archive(Storage(directory), attempt, keep)
            self._shelves.append(Shelf(archive, is_shared=is_store, lists=commits))
            self._destinations.append(
                Destination(
                    world, self._writer, directory, attempt=attempt, keep=keep, commits=commits, is_store=is_store
                )
            )
        self._board.update(saves=self._report)

    def restore(self) -> None:
        """Go on from this job's newest whole checkpoint, else from restoreFrom, else from the start. Collective."""
        run = self._run
        self._board.update(phase=TrainerPhase.RESTORING, total_steps=run.total_steps)
        if self._spec is not None:
            for shelf in self._shelves:
                if shelf.lists:
                    shelf.archive.claim()
            found = resume(run, self._shelves, self._notice)
            if found is not None:
                restored, is_own = found
                self._board.update(restored_from=restored.report.uri)
                if is_own and restored.is_in_store:
                    self._newest_step = run.step
                    self._board.saved(restored.report)
                self._log(f"step={run.step} restored={restored.report.uri}")
            self._pace = Pace(self._spec, run.config, run.step)
        self._board.update(phase=TrainerPhase.TRAINING, step=run.step, tokens=run.tokens)
        self._board.begin_step(run.step)

    def votes(self, is_asked: bool = False) -> list[int]:
        """This rank's part of what all agree on as a step begins, to be added up over all ranks and given to `heed`.

        is_asked: whether somebody wants a checkpoint at its end.
        """
        if not self._destinations:
            return []
        for end in self._writer.poll():
            for place in self._destinations:
                place.receive(end)
        step, is_first = self._run.step + 1, self._run.world.rank == 0
        due = self._pace.due(step) if is_first else Reach.NOWHERE
        is_busy = not self._slabs.has_free or any(place.under_way >= MAX_UNDER_WAY for place in self._destinations)
        is_on_its_way = self._newest_step is not None and self._newest_step >= self._requested_step
        nonce = secrets.randbits(32) if is_first else 0
        progress = itertools.chain.from_iterable(place.votes() for place in self._destinations)
        return [int(is_asked and not is_on_its_way), due, nonce, int(is_busy), *progress]

    def heed(self, sums: Sequence[int], *, is_last: bool) -> None:
        """Go on with the saves under way, and decide what begins at the end of this step. Collective.

        is_last: whether this is the step after which the run ends or stops.
        """
        if not self._destinations:
            return
        asked, due, self._nonce, busy, *progress = sums
        self._was_quiet = not self._is_under_way
        self._advance(progress)
        move = next_move(Reach(due), self._waits, is_urgent=asked > 0 or is_last, is_busy=busy > 0)
        if move.waits and not self._waits:
            self._tell(put_off=self._report.put_off + 1)
            logger.info(f"step={self._run.step + 1} checkpoint put off: those before it are still being written")
        self._begins, self._waits = move.begins, move.waits

    def end_step(self, training_seconds: float) -> None:
        """Begin the save that was decided on, of the step that has just ended.

        training_seconds: since training began, without pauses.
        """
        if not self._destinations:
            return
        self._pace.step_ended(training_seconds, is_quiet=self._was_quiet)
        if self._begins is not Reach.NOWHERE:
            self._begin(self._begins)
            self._was_quiet = False

    def release(self) -> None:
        """Before the optimizer changes what is being copied: wait until it may."""
        if not self._destinations:
            return
        began = time.monotonic()
        self._staging.release()
        if self._stall_seconds is not None:
            self._tell(stall_seconds=self._stall_seconds + time.monotonic() - began)
            self._stall_seconds = None

    def finish(self) -> None:
        """Save this step if it is not, and wait until all is committed. Collective.

        StorageError or ConfigError when this step could not be saved; Stopped when the grace ends before.
        """
        if not self._destinations:
            return
        self._board.update(phase=TrainerPhase.SAVING)
        world = self._run.world
        if self._newest_step != self._run.step:
            self.heed(world.agree(*self.votes()), is_last=True)
            self._begin(self._begins)
        self.release()
        while self._is_under_way:
            time.sleep(POLL_SECONDS)
            is_over, *sums = world.agree(self._seconds_left() == 0, *self.votes())
            self._advance(sums[4:])
            if is_over and self._is_under_way:
                for place in self._destinations:
                    place.abandon()
                raise Stopped(
                    f"asked to stop: left at step {self._run.step}, not saved: its checkpoint was not written within "
                    f"{self._grace_seconds:.0f} s; raise checkpointTimeoutSeconds"
                )
        ended = self._ended
        if ended is not None and ended.save.step == self._run.step and ended.error is not None:
            raise ended.error

    def where(self) -> str:
        """For a message: where this step was saved, if it was."""
        checkpoint = self._board.status.checkpoint
        saved = checkpoint is not None and checkpoint.step == self._run.step
        return f", saved in {checkpoint.uri}" if checkpoint is not None and saved else ""

    def close(self) -> None:
        """End threads and the writer, and give the memory back. What is under way is lost."""
        if self._destinations:
            has_ended = self._staging.close(CLOSE_SECONDS)
            self._writer.close(CLOSE_SECONDS)
            if has_ended:
                self._slabs.close()

    def _share(self) -> Share:
        return self._divider.share(contents.replicated(self._run), contents.own(self._run))

    def _begin(self, reach: Reach) -> None:
        run, began = self._run, time.monotonic()
        share = self._share()
        save = Save(
            step=run.step,
            name=self._shelves[-1].archive.new_name(run.step, self._nonce),
            file=share.file,
            size_bytes=share.layout.size_bytes,
            replicated=share.replicated,
            own=share.own,
            begin_time=began,
        )
        places = [place for place in self._destinations if reach is Reach.STORE or not place.is_store]
        has_memory = self._staging.wait_for_slab(self._seconds_left())
        uploads = [next(self._uploads) for _ in places]
        for place, upload in zip(places, uploads, strict=True):
            place.begin(save, upload)
        if has_memory:
            save.staged = self._staging.begin(share.tensors, share.layout, uploads)
        else:
            save.error = StorageError("the checkpoints before it took no part in time, so no memory was free for it")
        if reach is Reach.STORE:
            self._newest_step = run.step
            self._pace.save_began(run.step)
        self._stall_seconds = time.monotonic() - began

    def _advance(self, progress: Sequence[int]) -> None:
        for place, done, failed in zip(self._destinations, progress[::2], progress[1::2], strict=True):
            outcome = place.heed(done, failed)
            if outcome is not None:
                self._end(place, outcome)

    def _end(self, place: Destination, outcome: Outcome) -> None:
        if isinstance(outcome.error, PeerLost):
            raise outcome.error
        if place.is_store:
            self._ended = outcome
        step, seconds, error = outcome.save.step, outcome.seconds, outcome.error
        report = self._report
        if error is not None:
            self._tell(failed=report.failed + 1, failed_in_row=report.failed_in_row + 1, failure=str(error))
            self._log(f"step={step} checkpoint given up after {seconds:.1f} s: {error}", logging.WARNING)
        elif place.is_store:
            self._pace.save_ended(seconds)
            self._tell(committed=report.committed + 1, failed_in_row=0, failure="", write_seconds=seconds)
            self._board.saved(outcome.report)
            self._log(f"step={step} checkpoint={outcome.report.uri} bytes={outcome.report.size_bytes}")

    @property
    def _requested_step(self) -> int:
        """That somebody wants saved, at least."""
        return self._board.status.checkpoint_requested_step or 0

    @property
    def _is_under_way(self) -> bool:
        return any(place.under_way for place in self._destinations)

    def _seconds_left(self) -> float | None:
        """Of the grace; None while nobody asked to stop."""
        age_seconds = self._stop.age_seconds
        return None if age_seconds is None else max(0.0, self._grace_seconds - age_seconds)

    def _tell(self, **changes: Any) -> None:
        interval_steps = self._pace.interval_steps
        self._report = self._report.model_copy(update={**changes, "interval_steps": interval_steps})
        self._board.update(saves=self._report)

    def _notice(self, notice: str) -> None:
        self._board.add_notice(notice)
        self._log(notice, logging.WARNING)

    def _log(self, line: str, level: int = logging.INFO) -> None:
        if self._run.world.rank == 0:
            logger.log(level, line)


def _open_slabs(file_bytes: int, spec: CheckpointSpec, run: Run) -> Slabs:
    budget_bytes = spec.host_memory_bytes or default_budget_bytes(run.config.processes_per_node)
    try:
        return Slabs.open(file_bytes, budget_bytes, PART_BYTES, run.world.device)
    except OSError as error:
        raise ConfigError(
            f"no host memory for checkpoints ({error.strerror}); lower training.checkpoint.hostMemoryBytes"
        ) from error
