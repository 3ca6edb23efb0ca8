"""Asks rank 0 of every running job how far it is, and marks the job as due when the answer is worth a write.

That is at once for what people wait for (phase, checkpoint, notices), and seldom for a step count that moves all the
time. A trainer that does not answer is never the reason that a job fails.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import NoReturn, Self

import aiohttp

from pylon_api import names
from pylon_api.run import TrainerStatus
from pylon_operator import metrics, rank0
from pylon_operator.store import JobKey

MOVING = {
    "step",
    "tokens",
    "loss",
    "tokens_per_second",
    "gate",
    "difficulty",
    "control",
    "bytes_per_step",
    "bytes_per_step_peak",
    "step_seconds",
    "saves",
}
"""Fields that change with every answer of a healthy run, or so often that they may wait their turn."""
MISSED_POLLS = 3
"""So many silent polls and the last answer no longer counts."""


@dataclass(frozen=True, slots=True)
class Target:
    """Rank 0 of the current attempt of one job."""

    job: JobKey
    uid: str
    attempt: int
    ip: str


@dataclass(frozen=True, slots=True)
class _Answer:
    status: TrainerStatus
    published: float
    """When `status` was said. Later answers that differed by progress alone are not in it."""
    heard: float
    """When rank 0 last answered at all."""


class Poller:
    """The trainers' answers by PylonJob uid. All times in seconds.

    `poll_seconds`: between two questions to a job; `progress_seconds`: mere progress is shown at most so often;
    `concurrency`: questions at a time.
    """

    def __init__(
        self,
        mark: Callable[[JobKey], None],
        *,
        poll_seconds: float = 5,
        progress_seconds: float = 10,
        concurrency: int = 32,
    ) -> None:
        self._mark = mark
        self._poll_seconds = poll_seconds
        self._progress_seconds = progress_seconds
        self._slots = asyncio.Semaphore(concurrency)
        self._answers: dict[str, _Answer] = {}
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(headers={"User-Agent": "pylon-operator"})
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    def status(self, uid: str, attempt: int) -> TrainerStatus | None:
        """What rank 0 last said that was worth a write; None when it is of another attempt or has fallen silent.

        Whoever reconciles for another reason sees no newer step count either: otherwise each look would cost a write.
        """
        answer = self._answers.get(uid)
        if answer is None or answer.status.attempt != attempt or not self._fresh(answer):
            return None
        return answer.status

    async def request_checkpoint(self, ip: str, token: str) -> bool:
        """Ask rank 0 to save at its next step; whether it took the request."""
        return await rank0.request_checkpoint(self._session, _host(ip), names.PORT_STATUS, token)

    async def run(self, targets: Callable[[], Iterable[Target]]) -> NoReturn:
        """Poll what `targets` names at the time, for ever."""
        while True:
            started = time.monotonic()
            await asyncio.gather(*(self._poll(target) for target in targets()))
            self._answers = {uid: answer for uid, answer in self._answers.items() if self._fresh(answer)}
            await asyncio.sleep(max(0.0, started + self._poll_seconds - time.monotonic()))

    async def _poll(self, target: Target) -> None:
        async with self._slots:
            status = await rank0.get_status(self._session, _host(target.ip), names.PORT_STATUS)
        if status is None:
            metrics.POLLS.labels("silent").inc()
        elif (status.uid, status.attempt) != (target.uid, target.attempt):
            metrics.POLLS.labels("other").inc()  # an address that was used again, or an older attempt
        else:
            metrics.POLLS.labels("answered").inc()
            self._take(target, status)

    def _take(self, target: Target, status: TrainerStatus) -> None:
        now = time.monotonic()
        old = self._answers.get(target.uid)
        if old is None or _differ(old.status, status, but_for=MOVING):
            due = True
        else:
            due = now - old.published >= self._progress_seconds and _differ(old.status, status)
        if due:
            self._answers[target.uid] = _Answer(status, published=now, heard=now)
            self._mark(target.job)
        elif old is not None:
            self._answers[target.uid] = _Answer(old.status, old.published, heard=now)

    def _fresh(self, answer: _Answer) -> bool:
        limit = MISSED_POLLS * self._poll_seconds + (rank0.TIMEOUT.total or 0)
        return time.monotonic() - answer.heard <= limit


def _differ(old: TrainerStatus, new: TrainerStatus, but_for: set[str] | None = None) -> bool:
    return old.model_dump(exclude=but_for) != new.model_dump(exclude=but_for)


def _host(ip: str) -> str:
    return f"[{ip}]" if ":" in ip else ip
