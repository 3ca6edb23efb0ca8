"""Talks to rank 0 of running jobs: what it answered last, and the request to save. Never the reason that a job fails.

Polling is a loop of its own that marks a job as due when an answer is worth a write: at once for what people wait for
(phase, checkpoint, notices), seldom for a step count that moves all the time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import NoReturn, Self

import aiohttp
from pydantic import ValidationError

from pylon_api import names
from pylon_api.run import TrainerStatus
from pylon_operator import metrics
from pylon_operator.store import JobKey

logger = logging.getLogger(__name__)

MOVING = {"step", "tokens", "loss", "tokens_per_second", "token_ratio", "bytes_per_step", "step_seconds"}
"""Fields that change with every answer of a healthy run."""
ANSWER_LIMIT = 2**18
"""Bytes of an answer that are read; a real one has a few thousand."""
MISSED_POLLS = 3
"""So many silent polls and the last answer no longer counts."""


@dataclass(frozen=True, slots=True)
class Target:
    """Rank 0 of the current attempt of one job."""

    job: JobKey
    uid: str
    attempt: int
    ip: str


@dataclass(slots=True)
class _Answer:
    status: TrainerStatus
    heard: float
    marked: float


class Rank0s:
    """The trainers' newest answers, by PylonJob uid. All times in seconds.

    `poll_seconds`: between two questions to a job; `progress_seconds`: at most one write for mere progress in so long;
    `timeout_seconds`: for one question; `concurrency`: questions at a time.
    """

    def __init__(
        self,
        mark: Callable[[JobKey], None],
        *,
        poll_seconds: float = 5,
        progress_seconds: float = 10,
        timeout_seconds: float = 3,
        concurrency: int = 32,
    ) -> None:
        self._mark = mark
        self._poll_seconds = poll_seconds
        self._progress_seconds = progress_seconds
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        self._slots = asyncio.Semaphore(concurrency)
        self._answers: dict[str, _Answer] = {}
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(timeout=self._timeout, headers={"User-Agent": "pylon-operator"})
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    def status(self, uid: str, attempt: int) -> TrainerStatus | None:
        """The newest answer, if it is of this attempt and not older than three polls."""
        answer = self._answers.get(uid)
        if answer is None or answer.status.attempt != attempt:
            return None
        return answer.status if self._fresh(answer) else None

    async def request_checkpoint(self, ip: str, token: str) -> None:
        """Ask for a save at the next step. A trainer that does not answer is logged: the plan has its own time limit."""
        try:
            async with self._session.post(
                f"http://{_host(ip)}:{names.PORT_STATUS}/checkpoint", headers={"Authorization": f"Bearer {token}"}
            ) as response:
                if response.status >= 400:
                    logger.warning("rank 0 refused to save", extra={"ip": ip, "code": response.status})
        except (aiohttp.ClientError, TimeoutError) as error:
            logger.warning("rank 0 was not reached to save: %s", error or "no answer in time", extra={"ip": ip})

    async def run(self, targets: Callable[[], Iterable[Target]]) -> NoReturn:
        """Poll what `targets` names at the time, for ever."""
        while True:
            started = time.monotonic()
            await asyncio.gather(*(self._poll(target) for target in targets()))
            self._answers = {uid: answer for uid, answer in self._answers.items() if self._fresh(answer)}
            await asyncio.sleep(max(0.0, started + self._poll_seconds - time.monotonic()))

    def _fresh(self, answer: _Answer) -> bool:
        limit = MISSED_POLLS * self._poll_seconds + (self._timeout.total or 0)
        return time.monotonic() - answer.heard <= limit

    async def _poll(self, target: Target) -> None:
        async with self._slots:
            try:
                async with self._session.get(f"http://{_host(target.ip)}:{names.PORT_STATUS}/status") as response:
                    response.raise_for_status()
                    status = TrainerStatus.model_validate_json(await _read(response.content))
            except (aiohttp.ClientError, TimeoutError):
                metrics.POLLS.labels("silent").inc()
                return
            except ValidationError as error:
                metrics.POLLS.labels("malformed").inc()
                logger.warning("rank 0 answered with something else: %d errors", error.error_count(), extra=_about(target))
                return
        if (status.uid, status.attempt) != (target.uid, target.attempt):
            metrics.POLLS.labels("other").inc()  # an address that was reused, or an older attempt
            return
        metrics.POLLS.labels("answered").inc()
        self._take(target, status)

    def _take(self, target: Target, status: TrainerStatus) -> None:
        now = time.monotonic()
        old = self._answers.get(target.uid)
        marked = old.marked if old is not None else float("-inf")
        if old is None or _differ(old.status, status, exclude=MOVING):
            due = True
        else:
            due = now - marked >= self._progress_seconds and _differ(old.status, status)
        self._answers[target.uid] = _Answer(status, now, now if due else marked)
        if due:
            self._mark(target.job)


def _differ(old: TrainerStatus, new: TrainerStatus, exclude: set[str] | None = None) -> bool:
    return old.model_dump(exclude=exclude) != new.model_dump(exclude=exclude)


async def _read(content: aiohttp.StreamReader) -> bytes:
    """The whole answer, or its first ANSWER_LIMIT bytes, which then are no JSON: any pod may pose as a trainer."""
    try:
        return await content.readexactly(ANSWER_LIMIT)
    except asyncio.IncompleteReadError as error:
        return error.partial


def _host(ip: str) -> str:
    return f"[{ip}]" if ":" in ip else ip


def _about(target: Target) -> dict[str, object]:
    return {"job": "/".join(target.job), "attempt": target.attempt}
