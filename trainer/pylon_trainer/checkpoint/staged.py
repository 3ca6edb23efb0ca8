"""How far one save has come on its way through a slab: what is copied, which upload still needs which part.

The loop, the copier's thread and the writer's thread all look here; every change is made under one lock that all saves
share, and whoever waits is woken by it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor

from pylon_trainer.checkpoint.layout import Layout
from pylon_trainer.checkpoint.slab import Slab, Slabs


class Mark(Protocol):
    """A point in the order of copies: a torch.cuda.Event, or what stands for it on the CPU."""

    def query(self) -> bool:
        """Whether everything before it is done."""

    def synchronize(self) -> None:
        """Wait until everything before it is done."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from this mark to a later one, both done."""


class Staged:
    """One save, from Staging.begin until its slab is free."""

    def __init__(
        self,
        layout: Layout,
        sources: dict[str, Tensor],
        ready: Mark,
        slab: Slab,
        slabs: Slabs,
        uploads: Iterable[int],
        changed: threading.Condition,
    ) -> None:
        self.layout = layout
        self.slab = slab
        self.sources = sources
        """Tensors of the layout, and the header; held until they are copied, so that their memory stays theirs."""
        self.ready = ready
        """On the compute stream, after the step that is saved."""
        self.last_copy: Mark | None = None
        """After the last copy; set before `issued`."""
        self.issued = threading.Event()
        self.error: Exception | None = None
        """Why it cannot be committed. After a StorageError training goes on; any other is raised by release()."""
        self.copy_seconds: float | None = None
        """From the beginning of the first copy to the end of the last; None before, and when it failed."""
        self.is_copied = False
        """Whether the copier is through with the tensors: all is copied, or there is an error, or it was cancelled."""
        self.is_cancelled = False
        self.is_free = False
        """Whether its slab serves others again: the copier is through, and every upload took every part or ended."""
        self._slabs = slabs
        self._changed = changed
        expected = frozenset(uploads)
        offsets = range(0, layout.size_bytes, slabs.part_bytes) if expected else ()
        self._uploads_without = {offset: set(expected) for offset in offsets}

    def cancel(self) -> None:
        """Copy no further, and give up the slab. Its uploads must be cancelled too, by whoever began them."""
        with self._changed:
            self.is_cancelled = True
            self._uploads_without.clear()
            self._settle()

    def uploads_without(self, offset: int) -> list[int]:
        """Uploads that have yet to take the part at this offset in the file."""
        with self._changed:
            return sorted(self._uploads_without.get(offset, ()))

    def take(self, upload: int, offset: int) -> None:
        """This upload needs the part at this offset no more. Nothing happens if it is not one of this save."""
        with self._changed:
            self._take(upload, offset)
            self._settle()

    def end(self, upload: int) -> None:
        """This upload needs no part any more."""
        with self._changed:
            for offset in list(self._uploads_without):
                self._take(upload, offset)
            self._settle()

    def wait_until_taken(self, offset: int, timeout_seconds: float) -> bool:
        """Wait until nobody needs the part at this offset, or the save is cancelled; False when that took too long."""
        with self._changed:
            return self._changed.wait_for(lambda: offset not in self._uploads_without, timeout_seconds)

    @contextmanager
    def keeping_errors(self) -> Iterator[None]:
        """In the copier's thread, which nobody hears: the first error is kept for release(), and whoever looks, to
        raise. The writer is told of no more parts."""
        try:
            yield
        except Exception as error:
            with self._changed:
                self.error = self.error or error
                self._uploads_without.clear()
                self._changed.notify_all()

    def finish(self) -> None:
        """The copier is through."""
        with self._changed:
            self.sources = {}
            self.is_copied = True
            self.issued.set()
            self._settle()

    def _take(self, upload: int, offset: int) -> None:
        uploads = self._uploads_without.get(offset)
        if uploads is not None:
            uploads.discard(upload)
            if not uploads:
                del self._uploads_without[offset]

    def _settle(self) -> None:
        if self.is_copied and not self._uploads_without and not self.is_free:
            self.is_free = True
            self._slabs.give_back(self.slab)
        self._changed.notify_all()
