"""The writer as its rank sees it: orders that never wait for a store, answers when somebody asks.

Whatever becomes of the writer, each file and each commit gets one ending.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Protocol, Self

from pylon_trainer.checkpoint.manifest import Manifest
from pylon_trainer.checkpoint.orders import (
    Answer,
    Begin,
    Cancel,
    Commit,
    Discard,
    End,
    Failed,
    Order,
    Part,
    Taken,
)
from pylon_trainer.checkpoint.writer import Writer
from pylon_trainer.checkpoint.writer_process import SharedArena, WriterProcess
from pylon_trainer.errors import StorageError

_WITHIN_PROCESS = "memory://"
"""Stores that another process cannot see."""


class _Peer(Protocol):
    def handle(self, order: Order) -> None: ...
    def close(self, timeout_seconds: float) -> bool: ...


class WriterHandle:
    """Give it orders from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._pending: set[int] = set()
        self._endings: list[End] = []
        self._taken: Callable[[int, int], None] = lambda _upload, _offset: None
        self._ended: Callable[[int], None] = lambda _upload: None
        self._peer: _Peer

    @classmethod
    def open(cls, arena: SharedArena, uris: Iterable[str]) -> Self:
        """A process, unless one of the stores is to be written from within this one."""
        is_within = any(uri.startswith(_WITHIN_PROCESS) for uri in uris)
        return cls.in_thread(arena) if is_within else cls.in_process(arena)

    @classmethod
    def in_process(cls, arena: SharedArena) -> Self:
        """A process of its own, started now."""
        handle = cls()
        handle._peer = WriterProcess(arena, handle._receive, handle._lose, handle._is_wanted)
        return handle

    @classmethod
    def in_thread(cls, arena: SharedArena) -> Self:
        """Threads of this process."""
        handle = cls()
        handle._peer = Writer(arena.buffer, handle._receive)
        return handle

    def begin(self, upload: int, uri: str, path: str, size_bytes: int) -> None:
        """See orders.Begin."""
        self._expect(upload)
        self._peer.handle(Begin(upload, uri, path, size_bytes))

    def part(self, upload: int, offset_in_file: int, offset_in_arena: int, length: int) -> None:
        """See orders.Part. If the file has ended, `listen` is told so again: at first the listener may not have known
        of it."""
        with self._changed:
            is_awaited = upload in self._pending
        if is_awaited:
            self._peer.handle(Part(upload, offset_in_file, offset_in_arena, length))
        else:
            self._ended(upload)

    def cancel(self, upload: int) -> None:
        """See orders.Cancel."""
        self._peer.handle(Cancel(upload))

    def commit(self, upload: int, uri: str, attempt: int, keep: int, name: str, manifest: Manifest) -> None:
        """See orders.Commit."""
        self._expect(upload)
        self._peer.handle(Commit(upload, uri, attempt, keep, name, manifest))

    def discard(self, uri: str, attempt: int, keep: int, name: str) -> None:
        """See orders.Discard."""
        self._peer.handle(Discard(uri, attempt, keep, name))

    def listen(self, taken: Callable[[int, int], None], ended: Callable[[int], None]) -> None:
        """From now on call, from any thread: taken(upload, offset_in_file) for each part whose range of the arena may
        change, ended(upload) once nothing reads the arena for it any more, and again for each part that comes later."""
        self._taken, self._ended = taken, ended

    def poll(self) -> list[End]:
        """Endings of files and commits that came since the last call, in order."""
        with self._changed:
            endings, self._endings = self._endings, []
        return endings

    def wait(self, timeout_seconds: float) -> bool:
        """Wait until there is something to poll; False when nothing came in this time."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._endings), timeout_seconds)

    def close(self, timeout_seconds: float) -> bool:
        """Give up what is under way, remove it and end. False when that took too long: remains may lie in the store."""
        return self._peer.close(timeout_seconds)

    def _expect(self, upload: int) -> None:
        with self._changed:
            self._pending.add(upload)

    def _receive(self, answer: Answer) -> None:
        if isinstance(answer, Taken):
            self._taken(answer.upload, answer.offset_in_file)
            return
        with self._changed:
            self._pending.discard(answer.upload)
        self._ended(answer.upload)  # a part that comes now is told so by `part`
        with self._changed:
            self._endings.append(answer)
            self._changed.notify_all()

    def _lose(self, why: str) -> None:
        with self._changed:
            lost = sorted(self._pending)
        for upload in lost:
            self._receive(Failed(upload, why, StorageError))

    def _is_wanted(self, order: Order) -> bool:
        """An order about a file that failed with an earlier process means nothing to a later one."""
        with self._changed:
            return isinstance(order, Discard) or order.upload in self._pending
