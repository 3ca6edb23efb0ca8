"""Polling rank 0: whose answer counts, and when it is worth a write."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from operator_builders import UID, a_checkpoint, a_trainer

from pylon_api.run import GateDecision, GateReport, TrainerStatus
from pylon_operator import rank0
from pylon_operator.poll import Poller, Target
from pylon_operator.store import JobKey

Eventually = Callable[[Callable[[], object]], Awaitable[None]]
JOB = ("team", "demo")


class Trainer:
    """Rank 0 in place of `rank0`: says what it is told to."""

    def __init__(self) -> None:
        self.says: TrainerStatus | None = a_trainer()
        self.asked = 0
        self.busy = self.most_busy = 0

    async def get_status(self, session: object, host: str, port: int) -> TrainerStatus | None:
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)
        await asyncio.sleep(0)
        self.busy -= 1
        self.asked += 1
        return self.says


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    fake = Trainer()
    monkeypatch.setattr(rank0, "get_status", fake.get_status)
    return fake


class Polling:
    """A poller at work, and the jobs that it marked."""

    def __init__(self, trainer: Trainer, targets: int = 1, **options: Any) -> None:
        self.trainer = trainer
        self.marked: list[JobKey] = []
        self.poller = Poller(self.marked.append, **{"poll_seconds": 0.002, "progress_seconds": 3600} | options)
        self.targets = [Target(JOB, UID, 1, "127.0.0.1") for _ in range(targets)]

    async def __aenter__(self) -> Polling:
        await self.poller.__aenter__()
        self.task = asyncio.create_task(self.poller.run(lambda: self.targets))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await self.poller.__aexit__(None, None, None)

    async def polled_again(self) -> None:
        async with asyncio.timeout(5):
            asked = self.trainer.asked
            while self.trainer.asked < asked + 3:
                await asyncio.sleep(0.001)


async def test_the_first_answer_marks_the_job_and_the_same_again_does_not(trainer: Trainer) -> None:
    async with Polling(trainer) as polling:
        await polling.polled_again()
        assert polling.marked == [JOB]
        assert polling.poller.status(UID, 1) == trainer.says


async def test_progress_alone_waits_and_costs_no_write_in_between(trainer: Trainer) -> None:
    async with Polling(trainer) as polling:
        await polling.polled_again()
        trainer.says = a_trainer(step=11, gate=GateReport(decision=GateDecision.GATED, ratio=0.4))
        await polling.polled_again()
        assert polling.marked == [JOB]
        status = polling.poller.status(UID, 1)
        assert status is not None
        assert status.step == 10


async def test_progress_is_shown_in_its_time(trainer: Trainer, eventually: Eventually) -> None:
    async with Polling(trainer, progress_seconds=0.01) as polling:
        await polling.polled_again()
        trainer.says = a_trainer(step=11)
        await eventually(lambda: polling.marked == [JOB, JOB])


async def test_a_checkpoint_is_shown_at_once_with_the_step_of_the_same_moment(trainer: Trainer) -> None:
    async with Polling(trainer) as polling:
        await polling.polled_again()
        trainer.says = a_trainer(step=25, checkpoint=a_checkpoint(20))
        await polling.polled_again()
        assert polling.marked == [JOB, JOB]
        status = polling.poller.status(UID, 1)
        assert status is not None
        assert (status.step, status.checkpoint) == (25, a_checkpoint(20))


@pytest.mark.parametrize("answer", [a_trainer(uid="another-job"), a_trainer(attempt=2), None])
async def test_what_another_says_does_not_count(trainer: Trainer, answer: TrainerStatus | None) -> None:
    trainer.says = answer
    async with Polling(trainer) as polling:
        await polling.polled_again()
        assert polling.marked == []
        assert polling.poller.status(UID, 1) is None


async def test_an_answer_of_an_earlier_attempt_is_not_the_present_ones(trainer: Trainer) -> None:
    async with Polling(trainer) as polling:
        await polling.polled_again()
        assert polling.poller.status(UID, 2) is None


async def test_a_trainer_that_falls_silent_is_forgotten(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    monkeypatch.setattr(rank0, "TIMEOUT", rank0.TIMEOUT.__class__(total=0.001))
    async with Polling(trainer) as polling:
        await polling.polled_again()
        trainer.says = None
        await eventually(lambda: polling.poller.status(UID, 1) is None)


async def test_only_so_many_are_asked_at_a_time(trainer: Trainer) -> None:
    async with Polling(trainer, targets=50, concurrency=4) as polling:
        await polling.polled_again()
        assert trainer.most_busy <= 4
