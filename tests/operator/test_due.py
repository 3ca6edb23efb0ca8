"""The set of due keys: nothing lost, nothing twice at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from pylon_operator.due import DueSet

Eventually = Callable[[Callable[[], object]], Awaitable[None]]


async def take(due: DueSet[str]) -> str:
    async with asyncio.timeout(5), due.take() as key:
        return key


async def nothing_is_due(due: DueSet[str]) -> bool:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02), due.take():
            pass
    return True


async def test_marks_of_one_key_become_one() -> None:
    due: DueSet[str] = DueSet()
    for _ in range(100):
        due.mark("a")
    assert await take(due) == "a"
    assert await nothing_is_due(due)


async def test_the_earliest_mark_counts() -> None:
    due: DueSet[str] = DueSet()
    due.mark("a", 3600)
    assert await nothing_is_due(due)
    due.mark("a", 0.001)
    due.mark("a", 3600)
    assert await take(due) == "a"
    assert await nothing_is_due(due)


async def test_keys_come_in_the_order_of_their_times() -> None:
    due: DueSet[str] = DueSet()
    for key, after in (("c", 0.02), ("a", 0.0), ("b", 0.01)):
        due.mark(key, after)
    assert [await take(due) for _ in range(3)] == ["a", "b", "c"]


async def test_a_key_that_is_worked_on_waits_for_its_worker(eventually: Eventually) -> None:
    due: DueSet[str] = DueSet()
    due.mark("a")
    async with due.take() as key:
        due.mark(key)
        due.mark("b")
        assert await take(due) == "b"
        assert await nothing_is_due(due)
    assert await take(due) == "a"


async def test_a_failure_in_the_block_gives_the_key_back() -> None:
    due: DueSet[str] = DueSet()
    due.mark("a")

    async def fail() -> None:
        async with due.take() as key:
            due.mark(key)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert await take(due) == "a"


async def test_no_two_workers_ever_hold_one_key() -> None:
    due: DueSet[int] = DueSet()
    held: set[int] = set()
    rounds = 0

    async def work() -> None:
        nonlocal rounds
        while rounds < 300:
            async with due.take() as key:
                assert key not in held
                held.add(key)
                await asyncio.sleep(0)
                rounds += 1
                due.mark(key)
                due.mark((key + 1) % 5, 0.0001)
                held.discard(key)

    due.mark(0)
    workers = [asyncio.create_task(work()) for _ in range(4)]
    async with asyncio.timeout(10):
        await asyncio.wait(workers, return_when=asyncio.FIRST_COMPLETED)
    for worker in workers:
        worker.cancel()
    done = await asyncio.gather(*workers, return_exceptions=True)
    assert all(result is None or isinstance(result, asyncio.CancelledError) for result in done)
    assert rounds >= 300


async def test_a_stuck_worker_shows() -> None:
    due: DueSet[str] = DueSet()
    assert due.oldest_running_seconds() == due.overdue_seconds() == 0
    due.mark("a")
    due.mark("b", 3600)
    assert due.overdue_seconds() > 0
    async with due.take():
        assert due.oldest_running_seconds() > 0
        assert due.overdue_seconds() == 0
