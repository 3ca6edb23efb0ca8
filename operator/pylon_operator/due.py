"""Says which job to reconcile next: a set of due keys, each worked on by one worker at a time.

Marking a key that is already due keeps the earlier time; marking one that is being worked on makes it due again
afterwards, so nothing is lost and nothing runs twice at once. It knows nothing of what a key stands for.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

from pylon_operator import metrics

K = TypeVar("K", bound=Hashable)


class DueSet(Generic[K]):
    """Keys and the times at which they are due, by the monotonic clock."""

    def __init__(self) -> None:
        self._due: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._marks = 0
        self._running: dict[K, float] = {}
        self._changed = asyncio.Event()

    def mark(self, key: K, after_seconds: float = 0) -> None:
        """Make `key` due in `after_seconds`, or earlier if it already was."""
        when = time.monotonic() + after_seconds
        if self._due.get(key, float("inf")) <= when:
            return
        self._due[key] = when
        self._push(key, when)
        metrics.QUEUE_DEPTH.set(len(self._due))

    def oldest_running_seconds(self) -> float:
        """How long the longest of the present reconciles has been at it; 0 when none is."""
        return max(0.0, time.monotonic() - min(self._running.values(), default=float("inf")))

    def overdue_seconds(self) -> float:
        """How long the most overdue key has waited for a worker; 0 when none has."""
        waiting = (when for key, when in self._due.items() if key not in self._running)
        return max(0.0, time.monotonic() - min(waiting, default=float("inf")))

    @asynccontextmanager
    async def take(self) -> AsyncIterator[K]:
        """Wait for a key that is due and that nobody works on, and hold it for the length of the block."""
        key = await self._next()
        try:
            yield key
        finally:
            del self._running[key]
            if key in self._due:  # marked meanwhile, and skipped by _next
                self._push(key, self._due[key])

    async def _next(self) -> K:
        while True:
            self._changed.clear()
            now, wait = time.monotonic(), None
            while self._heap:
                when, _, key = self._heap[0]
                if self._due.get(key) != when or key in self._running:  # superseded, or pushed again by take()
                    heapq.heappop(self._heap)
                elif when <= now:
                    heapq.heappop(self._heap)
                    del self._due[key]
                    self._running[key] = now
                    metrics.QUEUE_DEPTH.set(len(self._due))
                    return key
                else:
                    wait = when - now
                    break
            try:
                await asyncio.wait_for(self._changed.wait(), wait)
            except TimeoutError:
                continue

    def _push(self, key: K, when: float) -> None:
        self._marks += 1  # breaks ties, so that keys are never compared
        heapq.heappush(self._heap, (when, self._marks, key))
        self._changed.set()
