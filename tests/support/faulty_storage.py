"""A store in which something happens around one exact change, so that a test can try every one of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pylon_trainer.checkpoint.storage import Storage
from pylon_trainer.checkpoint.uploads import Upload
from pylon_trainer.errors import StorageError

WHEN = ("before", "midway", "after")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse() -> None:
    raise StorageError("cannot write: no space left there; free some or lower checkpoint.keep")


class FaultyStorage(Storage):
    """Counts the changes to the store; `fault` is called before, midway through, or after the one with number `at`."""

    def __init__(
        self,
        uri: str,
        at: int | None = None,
        when: str = "before",
        fault: Callable[[], None] = die,
        lasts: bool = False,
    ) -> None:
        """lasts: from then on every change meets the fault, and every look too, as in a store that is out of reach."""
        super().__init__(uri, sleep=lambda _: None)
        self.changes = 0
        self._at = at
        self._when = when
        self._fault = fault
        self._lasts = lasts

    @property
    def is_out_of_reach(self) -> bool:
        return self._lasts and self._at is not None and self.changes > self._at

    def change(self, whole: Callable[[], Any], half: Callable[[], Any]) -> Any:
        number, self.changes = self.changes, self.changes + 1
        if self._lasts and self._at is not None and number > self._at:
            self._fault()
        if number != self._at:
            return whole()
        if self._when == "midway":
            half()
        result = whole() if self._when == "after" else None
        self._fault()
        return result

    def write(self, path: str, data: bytes) -> None:
        super_write = super().write
        self.change(lambda: super_write(path, data), lambda: super_write(path, data[: len(data) // 2]))

    def create(self, path: str, data: bytes) -> None:
        super_create = super().create
        self.change(lambda: super_create(path, data), lambda: super_create(path, data[: len(data) // 2]))

    def upload(self, path: str, size_bytes: int, **options: Any) -> Upload:
        return FaultyUpload(self, super().upload(path, size_bytes, **options))

    def remove(self, path: str) -> None:
        super_remove = super().remove

        def remove_half() -> None:
            names = Storage.names(self, path)
            for name in names[: len(names) // 2]:
                super_remove(f"{path}/{name}")

        self.change(lambda: super_remove(path), remove_half)

    def names(self, path: str = "") -> list[str]:
        self._look()
        return super().names(path)

    def read(self, path: str) -> bytes:
        self._look()
        return super().read(path)

    def size(self, path: str) -> int | None:
        self._look()
        return super().size(path)

    def _look(self) -> None:
        if self.is_out_of_reach:
            self._fault()


class FaultyUpload:
    def __init__(self, storage: FaultyStorage, upload: Upload) -> None:
        self._storage = storage
        self._upload = upload

    def put(self, offset: int, data: memoryview) -> None:
        half = data[: len(data) // 2]
        self._storage.change(lambda: self._upload.put(offset, data), lambda: self._upload.put(offset, half))

    def finish(self) -> None:
        self._storage.change(self._upload.finish, lambda: None)

    def abort(self) -> None:
        with suppress(StorageError):
            self._storage.change(self._upload.abort, lambda: None)
