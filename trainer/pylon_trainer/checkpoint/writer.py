"""Writes files out of shared memory to any store, part by part, while they are still being filled.

Each file has threads of its own, so that a store that is slow or down holds up no other tier. A file ends whole and
durable, or not at all: what was begun of it is removed. What a file means is known only to Archive, which commits.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from pylon_trainer.checkpoint.archive import Archive
from pylon_trainer.checkpoint.manifest import PART_BYTES, FileEntry, checksum
from pylon_trainer.checkpoint.orders import (
    Answer,
    Begin,
    Cancel,
    Commit,
    Committed,
    Discard,
    Durable,
    Failed,
    Order,
    Part,
    Taken,
)
from pylon_trainer.checkpoint.storage import Storage, takes_any_order
from pylon_trainer.checkpoint.uploads import Upload
from pylon_trainer.errors import StorageError, TrainerError

logger = logging.getLogger("pylon")

CONCURRENT_PARTS = 8
"""Parts of one file that are under way at a time, where a store takes them in any order: one connection to an object
store carries about 100 MB/s."""


class Writer:
    """Carries out orders; `handle` only hands them to threads."""

    def __init__(self, arena: memoryview, answer: Callable[[Answer], None]) -> None:
        """answer: called from any thread."""
        self._arena = arena
        self._answer = answer
        self._targets: dict[str, _Target] = {}
        self._files: dict[int, _File] = {}
        self._ended = threading.Condition()

    def handle(self, order: Order) -> None:
        """Begin with an order. Any thread may call."""
        match order:
            case Begin():
                target = self._target(order.uri)
                with self._ended:
                    self._files[order.upload] = _File(order, target, self._arena, self._answer, self._end)
            case Part() | Cancel():
                with self._ended:
                    file = self._files.get(order.upload)  # it may have ended by itself
                if file is not None:
                    file.handle(order)
            case Commit() | Discard():
                target = self._target(order.uri)
                target.in_turn.submit(self._settle, order, target)

    def close(self, timeout_seconds: float) -> bool:
        """Give up all files, and see commits and removals through. False when that took longer than this time."""
        deadline = time.monotonic() + timeout_seconds
        with self._ended:
            files = list(self._files.values())
        for file in files:
            file.cancel()
        with self._ended:
            are_gone = self._ended.wait_for(lambda: not self._files, timeout_seconds)
            targets = list(self._targets.values())
        turns = [target.in_turn.submit(lambda: None) for target in targets]
        late = wait(turns, max(0.0, deadline - time.monotonic())).not_done
        for target in targets:
            target.in_turn.shutdown(wait=False, cancel_futures=True)
        return are_gone and not late

    def _target(self, uri: str) -> _Target:
        with self._ended:
            if uri not in self._targets:
                self._targets[uri] = _Target(uri)
            return self._targets[uri]

    def _end(self, upload: int) -> None:
        with self._ended:
            del self._files[upload]
            self._ended.notify_all()

    def _settle(self, order: Commit | Discard, target: _Target) -> None:
        try:
            archive = Archive(target.storage(), order.attempt, order.keep)
            if isinstance(order, Discard):
                archive.discard(order.name)
                return
            report = archive.commit(order.name, order.manifest)
        except Exception as error:  # the thread's end: whatever it was, somebody waits for an answer
            if isinstance(order, Commit):
                self._answer(_failed(order.upload, error))
            return
        # Before anything older goes: whoever hears nothing may take it that nothing older has gone.
        self._answer(Committed(order.upload, report))
        try:
            archive.prune()
        except Exception as error:  # the thread's end: nobody waits, but somebody should know
            logger.error("the clean-up after a commit failed", exc_info=error)


class _Target:
    """A URI that is written to. Its client is made when first used, by the thread that uses it."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._lock = threading.Lock()
        self._storage: Storage | None = None
        self.concurrent_parts = CONCURRENT_PARTS if takes_any_order(uri) else 1
        self.in_turn = ThreadPoolExecutor(1, thread_name_prefix="commit")
        """Commits and removals, one after the other."""

    def storage(self) -> Storage:
        with self._lock:
            if self._storage is None:
                self._storage = Storage(self._uri)
            return self._storage


class _File:
    """A file on its way. The last thread to leave it ends it."""

    def __init__(
        self,
        begin: Begin,
        target: _Target,
        arena: memoryview,
        answer: Callable[[Answer], None],
        ended: Callable[[int], None],
    ) -> None:
        self._begin = begin
        self._target = target
        self._arena = arena
        self._answer = answer
        self._ended = ended
        self._checksums = [""] * -(-begin.size_bytes // PART_BYTES)
        self._missing_bytes = begin.size_bytes
        self._upload: Upload | None = None
        self._opening = threading.Lock()
        self._counts = threading.Lock()
        self._tasks = 0
        self._is_ending = False
        self._is_cleaning = False
        self._failure: Failed | None = None
        self._given_up = threading.Event()
        self._threads = ThreadPoolExecutor(target.concurrent_parts, thread_name_prefix=f"upload-{begin.upload}")
        self._submit(self._opened)

    def handle(self, order: Part | Cancel) -> None:
        if isinstance(order, Part):
            self._submit(self._put, order)
        else:
            self.cancel()

    def cancel(self) -> None:
        self._fail(StorageError(f"{self._begin.uri}/{self._begin.path} was given up"))
        self._submit(lambda: None)

    def _submit(self, task: Callable[..., object], *arguments: Any) -> None:
        with self._counts:
            if self._is_ending:
                return
            self._tasks += 1
            self._threads.submit(self._run, task, *arguments)

    def _run(self, task: Callable[..., object], *arguments: Any) -> None:
        try:
            if self._failure is None:
                task(*arguments)
        except Exception as error:  # the thread's end: whatever it was, somebody waits for an answer
            self._fail(error)
        with self._counts:
            self._tasks -= 1
            self._is_ending = self._tasks == 0 and (self._missing_bytes == 0 or self._failure is not None)
            if not self._is_ending:
                return
        self._end()

    def _put(self, part: Part) -> None:
        upload = self._opened()
        with self._arena[part.offset_in_arena : part.offset_in_arena + part.length] as data:
            self._checksums[part.offset_in_file // PART_BYTES] = checksum(data)
            upload.put(part.offset_in_file, data)
        self._answer(Taken(part.upload, part.offset_in_file))
        with self._counts:
            self._missing_bytes -= part.length

    def _opened(self) -> Upload:
        with self._opening:
            if self._upload is None:
                storage = self._target.storage()
                self._upload = storage.upload(self._begin.path, self._begin.size_bytes, sleep=self._sleep)
            return self._upload

    def _end(self) -> None:
        if self._failure is None and self._upload is not None:
            try:
                self._upload.finish()
            except Exception as error:  # as in _run
                self._fail(error)
        if self._failure is None:
            entry = FileEntry(self._begin.size_bytes, PART_BYTES, tuple(self._checksums))
            self._answer(Durable(self._begin.upload, entry))
        else:
            self._clean_up()
            self._answer(self._failure)
        self._ended(self._begin.upload)
        self._threads.shutdown(wait=False)

    def _clean_up(self) -> None:
        self._is_cleaning = True
        try:
            if self._upload is not None:
                self._upload.abort()
        except Exception as error:  # as in _run; Archive removes it later
            logger.warning(_failed(self._begin.upload, error).message)

    def _fail(self, error: Exception) -> None:
        """The first failure is the one that is told."""
        with self._counts:
            if self._failure is None:
                self._failure = _failed(self._begin.upload, error)
        self._given_up.set()

    def _sleep(self, seconds: float) -> None:
        """Between tries; ends them when the file is given up, but not those that then clean up."""
        if self._is_cleaning:
            time.sleep(seconds)
        elif self._given_up.wait(seconds):
            raise StorageError("given up")


def _failed(upload: int, error: Exception) -> Failed:
    if isinstance(error, TrainerError):
        return Failed(upload, str(error), type(error))
    logger.error("the writer failed", exc_info=error)
    return Failed(upload, f"the writer failed: {error!r}", TrainerError)
