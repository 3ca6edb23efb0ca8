"""Saves and restores a run, with all ranks taking part, while training goes on.

Every step all ranks add up a few integers (`votes`), as they do anyway to agree on stopping: what rank 0 finds due,
whether memory is free everywhere, how far the saves under way are. So all know alike what begins at the end of the step
and what is committed (`heed`), and nobody waits for anybody. A save that fails is given up by all and training goes on;
only the last one must not fail. When to save is pace.py's to say, what goes in contents.py's.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

from pylon_api.run import TrainerPhase
from pylon_api.training import CheckpointSpec
from pylon_trainer.checkpoint import contents
from pylon_trainer.checkpoint.destination import Outcome
from pylon_trainer.checkpoint.ledger import Ledger
from pylon_trainer.checkpoint.pace import Pace
from pylon_trainer.checkpoint.pipeline import Pipeline
from pylon_trainer.checkpoint.policy import Reach, next_move
from pylon_trainer.checkpoint.resume import resume
from pylon_trainer.checkpoint.shelf import Shelf, shelves_of
from pylon_trainer.errors import PeerLost, Stopped, StorageError
from pylon_trainer.run import Run
from pylon_trainer.runtime.signals import StopFlag
from pylon_trainer.status import Board

EXIT_MARGIN_SECONDS = 8
"""What is kept of the pod's grace for leaving, once the last checkpoint is committed or given up."""

CLOSE_SECONDS = 1
"""For what is given up to be removed; what stays is cleaned up later."""

TIDY_SECONDS = 30
"""For what the last commit made superfluous to be removed."""

POLL_SECONDS = 0.02

_PROGRESS = 4
"""Where the pipeline's votes begin."""


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
        self._ledger = Ledger(board, logs=run.world.rank == 0)
        self._begins, self._waits, self._nonce = Reach.NOWHERE, Reach.NOWHERE, 0
        self._newest_step: int | None = None
        """Of the last checkpoint for the store that has begun, or that this run goes on from."""
        self._ended: Outcome | None = None
        """How the last save for the store ended."""
        self._overlapped = Reach.NOWHERE
        """How far the farthest checkpoint goes that is on its way in this step."""
        self._stall_seconds: float | None = None
        """Of a save whose tensors are still being copied."""
        self._is_finished = False
        self._pipeline: Pipeline | None = None
        if run.config.training.checkpoint is not None:
            self._open(run.config.training.checkpoint)

    def _open(self, spec: CheckpointSpec) -> None:
        run = self._run
        self._shelves = shelves_of(run.config, spec, run.world.rank)
        state = contents.replicated(run), contents.own(run)
        self._pipeline = Pipeline(run.world, spec, self._shelves, run.config.processes_per_node, *state)
        for line in self._pipeline.notices:
            self._ledger.notice(line)
        self._pace = Pace(spec, run.config)

    def restore(self) -> None:
        """Go on from this job's newest whole checkpoint, else from restoreFrom, else from the start. Collective."""
        run = self._run
        self._board.update(phase=TrainerPhase.RESTORING, total_steps=run.total_steps)
        if self._pipeline is not None:
            for shelf in self._shelves:
                self._claim(shelf)
            found = resume(run, self._shelves, self._ledger.notice)
            if found is not None:
                restored, is_own = found
                self._board.update(restored_from=restored.report.uri)
                if is_own and restored.is_in_store:
                    self._newest_step = run.step
                    self._board.saved(restored.report)
                self._ledger.log(f"step={run.step} restored={restored.report.uri}")
            self._pace.begin(run.step)
            self._ledger.interval(self._pace.interval_steps)
        self._board.update(phase=TrainerPhase.TRAINING, step=run.step, tokens=run.tokens)
        self._board.begin_step(run.step)

    def votes(self, is_asked: bool = False) -> list[int]:
        """This rank's part of what all agree on as a step begins, to be added up over all ranks and given to `heed`.

        is_asked: whether somebody wants a checkpoint at its end.
        """
        if self._pipeline is None:
            return []
        is_first = self._run.world.rank == 0
        is_wanted = is_asked and not self._is_answered and self._pace.may_answer
        due = self._pace.due(self._run.step + 1) if is_first else Reach.NOWHERE
        nonce = secrets.randbits(32) if is_first else 0
        return [int(is_wanted), due, nonce, int(self._pipeline.is_busy), *self._pipeline.votes()]

    def heed(self, sums: Sequence[int], *, is_last: bool) -> None:
        """Go on with the saves under way, and decide what begins at the end of this step. Collective.

        is_last: whether this is the step after which the run ends or stops.
        """
        if self._pipeline is None:
            return
        asked, due, self._nonce, busy = sums[:_PROGRESS]
        self._overlapped = self._pipeline.under_way
        self._advance(self._pipeline, sums)
        move = next_move(Reach(due), self._waits, is_urgent=asked > 0 or is_last, is_busy=busy > 0)
        if move.waits and not self._waits:
            self._ledger.put_off(self._run.step + 1)
        self._begins, self._waits = move.begins, move.waits

    def end_step(self, training_seconds: float) -> None:
        """Begin the save that was decided on, of the step that has just ended.

        training_seconds: since training began, without pauses.
        """
        if self._pipeline is None:
            return
        self._pace.step_ended(training_seconds, self._overlapped)
        if self._begins is not Reach.NOWHERE:
            self._begin(self._pipeline, self._begins)

    def release(self) -> None:
        """Before the optimizer changes what is being copied: wait until it may."""
        if self._pipeline is None:
            return
        began = time.monotonic()
        self._pipeline.release()
        if self._stall_seconds is not None:
            self._ledger.stalled(self._stall_seconds + time.monotonic() - began)
            self._stall_seconds = None

    def finish(self) -> None:
        """Save this step if it is not, and wait until all is committed. Collective.

        StorageError when the store did not take this step; Stopped when the grace ends before.
        """
        if self._pipeline is None:
            return
        self._board.update(phase=TrainerPhase.SAVING)
        if self._newest_step != self._run.step:
            self.heed(self._run.world.agree(*self.votes()), is_last=True)
            self._begin(self._pipeline, self._begins)
        self.release()
        self._drain(self._pipeline)
        ended = self._ended
        if ended is not None and ended.save.step == self._run.step and ended.error is not None:
            raise self._ledger.unsaved(ended.error)
        self._is_finished = True

    def where(self) -> str:
        """For a message: where this step was saved, if it was."""
        checkpoint = self._board.status.checkpoint
        saved = checkpoint is not None and checkpoint.step == self._run.step
        return f", saved in {checkpoint.uri}" if checkpoint is not None and saved else ""

    def close(self) -> None:
        """End threads and the writer, and give the memory back. What is under way is lost."""
        if self._pipeline is not None:
            left = self._seconds_left()
            seconds: float = TIDY_SECONDS if self._is_finished else CLOSE_SECONDS
            self._pipeline.close(seconds if left is None else min(seconds, left))

    def _claim(self, shelf: Shelf) -> None:
        try:
            if shelf.lists:
                shelf.archive.claim()
        except StorageError as error:
            if shelf.is_shared:
                raise
            self._ledger.notice(f"no checkpoints on this node's disk: {error}")

    def _begin(self, pipeline: Pipeline, reach: Reach) -> None:
        run, began = self._run, time.monotonic()
        name = self._shelves[-1].archive.new_name(run.step, self._nonce)
        state = contents.replicated(run), contents.own(run)
        pipeline.begin(run.step, name, *state, reach, self._seconds_left)
        if reach is Reach.STORE:
            self._newest_step = run.step
            self._pace.save_began(run.step)
        self._stall_seconds = time.monotonic() - began

    def _drain(self, pipeline: Pipeline) -> None:
        """Wait until nothing is under way; Stopped when the grace ends before."""
        while pipeline.under_way:
            time.sleep(POLL_SECONDS)
            is_over, *sums = self._run.world.agree(self._seconds_left() == 0, *self.votes())
            self._advance(pipeline, sums)
            if is_over and pipeline.under_way:
                pipeline.abandon()
                raise Stopped(
                    f"asked to stop: left at step {self._run.step}, not saved: its checkpoint was not written within "
                    f"{self._grace_seconds:.0f} s; raise checkpointTimeoutSeconds"
                )

    def _advance(self, pipeline: Pipeline, sums: Sequence[int]) -> None:
        for outcome in pipeline.advance(sums[_PROGRESS:]):
            if isinstance(outcome.error, PeerLost):
                raise outcome.error
            self._ledger.ended(outcome)
            if outcome.is_in_store:
                self._ended = outcome
                if outcome.error is None:
                    self._pace.save_ended(outcome.seconds)
                    self._ledger.interval(self._pace.interval_steps)
                elif self._is_answer(outcome.save.step):
                    self._pace.request_failed()

    @property
    def _is_answered(self) -> bool:
        """Whether the checkpoint that somebody asked for is on its way, or committed."""
        ended, newest_step = self._ended, self._newest_step
        is_lost = ended is not None and ended.error is not None and ended.save.step == newest_step
        return newest_step is not None and self._is_answer(newest_step) and not is_lost

    def _is_answer(self, step: int) -> bool:
        """Whether a checkpoint of this step is what somebody asked for and waits for."""
        requested_step = self._board.status.checkpoint_requested_step
        return requested_step is not None and step >= requested_step

    def _seconds_left(self) -> float | None:
        """Of the grace; None while nobody asked to stop."""
        age_seconds = self._stop.age_seconds
        return None if age_seconds is None else max(0.0, self._grace_seconds - age_seconds)
