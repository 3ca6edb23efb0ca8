"""Why a worker or a pod ended: what each worker leaves for its launcher, and the one message the pod ends with.

Decides between several ends; starts and stops nothing itself.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from pylon_api.names import SECONDARY, ExitCode
from pylon_api.run import TerminationReport

MAX_BYTES = 4096
"""Kubernetes truncates a longer termination message: half a JSON document would say nothing."""

_MESSAGE_CHARACTERS = 1000
CLOSED = 128 + signal.SIGTERM
"""A worker that its launcher closed before it could catch signals: a consequence, like the codes in SECONDARY."""


@dataclass(frozen=True, slots=True)
class WorkerEnd:
    """How one worker ended, and when."""

    time: float
    """Seconds since the epoch."""
    report: TerminationReport


def reason(exit_code: int) -> str:
    """CamelCase name of an exit code: BadConfig, SIGKILL, Exit3."""
    if exit_code in ExitCode.__members__.values():
        return ExitCode(exit_code).reason
    try:
        return signal.Signals(exit_code - 128).name
    except ValueError:
        return f"Exit{exit_code}"


def describe(exit_code: int, message: str, *, rank: int | None = None) -> TerminationReport:
    """A report whose message is one line of bounded length."""
    line = " ".join(message.split())
    if len(line) > _MESSAGE_CHARACTERS:
        line = line[: _MESSAGE_CHARACTERS - 1] + "…"
    return TerminationReport(exit_code=exit_code, reason=reason(exit_code), message=line, rank=rank)


def cause(ends: Iterable[WorkerEnd]) -> TerminationReport:
    """The report of the worker that failed first; consequences count only when there is nothing else."""
    return min(ends, key=lambda end: (_is_consequence(end.report.exit_code), end.time)).report


def _is_consequence(exit_code: int) -> bool:
    return exit_code in SECONDARY or exit_code == CLOSED


def write(report: TerminationReport, path: Path) -> None:
    """Write a report in one piece, so that a reader never sees half of it."""
    temporary = path.with_suffix(".partial")
    temporary.write_bytes(fit(report))
    temporary.rename(path)


def read(path: Path) -> WorkerEnd | None:
    """What a worker left, or None when it was killed before it could."""
    try:
        return WorkerEnd(path.stat().st_mtime, TerminationReport.model_validate_json(path.read_bytes()))
    except (OSError, ValidationError):
        return None


def fit(report: TerminationReport, limit: int = MAX_BYTES) -> bytes:
    """The report as JSON of fewer than `limit` bytes: the least useful parts of the last status go first."""
    for shorter in _ever_shorter(report):
        text = shorter.model_dump_json(by_alias=True, exclude_none=True).encode()
        if len(text) < limit:
            return text
    raise AssertionError("a report without its status fits, because its message is bounded")


def _ever_shorter(report: TerminationReport) -> Iterable[TerminationReport]:
    yield report
    final = report.final
    if final is not None:
        final = final.model_copy(update={"difficulty": None})
        yield report.model_copy(update={"final": final})
        if final.sample is not None:
            for characters in (600, 200):
                final = final.model_copy(update={"sample": final.sample[:characters]})
                yield report.model_copy(update={"final": final})
        saves = final.saves and final.saves.model_copy(update={"failure": final.saves.failure[:200]})
        final = final.model_copy(update={"notices": [notice[:200] for notice in final.notices[-3:]], "saves": saves})
        yield report.model_copy(update={"final": final})
        final = final.model_copy(update={"sample": None, "notices": []})
        yield report.model_copy(update={"final": final})
    yield report.model_copy(update={"final": None})
    for characters in (500, 100):
        yield report.model_copy(update={"final": None, "message": report.message[:characters]})
