"""What people are told of saving: the status board's report, the log, notices."""

from __future__ import annotations

import logging
from typing import Any

from pylon_api.run import CheckpointReport, SaveReport
from pylon_trainer.checkpoint.destination import Outcome
from pylon_trainer.errors import ConfigError, StorageError, TrainerError
from pylon_trainer.status import Board

logger = logging.getLogger("pylon")


class Ledger:
    """Of one attempt, on one rank; rank 0's is the one that anybody reads."""

    def __init__(self, board: Board, *, logs: bool) -> None:
        self._board = board
        self._logs = logs
        self._report = SaveReport()
        self._disk_fails = False
        self._on_disks: CheckpointReport | None = None
        """The last checkpoint that all nodes keep."""

    def notice(self, line: str) -> None:
        """Something to be told once."""
        self._board.add_notice(line)
        self.log(line, logging.WARNING)

    def log(self, line: str, level: int = logging.INFO) -> None:
        if self._logs:
            logger.log(level, line)

    def interval(self, steps: int | None) -> None:
        """Steps between checkpoints that are now in force."""
        if steps != self._report.interval_steps or self._board.status.saves is None:
            self._tell(interval_steps=steps)

    def put_off(self, step: int) -> None:
        """A checkpoint that was due has to wait."""
        self._tell(put_off=self._report.put_off + 1)
        self.log(f"step={step} checkpoint put off: those before it are still being written")

    def stalled(self, seconds: float) -> None:
        """So long did a checkpoint keep training from going on."""
        self._tell(stall_seconds=seconds)

    def ended(self, outcome: Outcome) -> None:
        """A checkpoint is committed or given up, in one place; training goes on."""
        is_committed = outcome.error is None
        if not outcome.is_in_store:
            self._kept_on_disks(outcome) if is_committed else self._disk_failed(outcome)
        elif is_committed:
            self._committed(outcome)
        else:
            self._given_up(outcome)

    def unsaved(self, error: TrainerError) -> TrainerError:
        """To leave with when the last step is not in the store: why, and what a restart goes on from.

        Refused credentials are no fault of the configuration by then. The store took this attempt's claim with them, so
        they have expired, and another attempt may be given fresh ones; one that is not says so as it begins.
        """
        kind = StorageError if isinstance(error, ConfigError) else type(error)
        kept = [checkpoint for checkpoint in (self._board.status.checkpoint, self._on_disks) if checkpoint]
        if not kept:
            return kind(f"{error}; nothing is saved")
        newest = max(kept, key=lambda checkpoint: checkpoint.recency)
        return kind(f"{error}; the newest kept is of step {newest.step}, in {newest.uri}")

    def _committed(self, outcome: Outcome) -> None:
        report, step = outcome.report, outcome.save.step
        self._tell(committed=self._report.committed + 1, failed_in_row=0, failure="", write_seconds=outcome.seconds)
        self._board.saved(report)
        self.log(f"step={step} checkpoint={report.uri} bytes={report.size_bytes} seconds={outcome.seconds:.2f}")

    def _disk_failed(self, outcome: Outcome) -> None:
        self._tell(failed=self._report.failed + 1)
        if not self._disk_fails:  # once, until one is kept again
            self.notice(f"checkpoints cannot be kept on the nodes' disks: {outcome.error}")
        self._disk_fails = True

    def _kept_on_disks(self, outcome: Outcome) -> None:
        self._disk_fails = False
        self._on_disks = outcome.report

    def _given_up(self, outcome: Outcome) -> None:
        failure = str(outcome.error)
        self._tell(failed=self._report.failed + 1, failed_in_row=self._report.failed_in_row + 1, failure=failure)
        self.log(f"step={outcome.save.step} checkpoint given up: {failure}", logging.WARNING)

    def _tell(self, **changes: Any) -> None:
        self._report = self._report.model_copy(update=changes)
        self._board.update(saves=self._report)
