"""Copies a state into a slab while the next step runs, and hands it to the writer part by part.

`begin` at the end of step N costs the loop an event and a hand-over. A thread issues the copies on a stream of their
own; `release`, before the optimizer of step N+1 writes to the tensors, puts the end of the copies before it on the
device, so that the host waits only until they are issued (tensors on the CPU: until they are copied). Nothing here
waits for the whole device, and nothing waits for a writer without a limit. The tensors must not be written between
`begin` and `release`: whoever has some that are, passes copies of them.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pylon_trainer.checkpoint.layout import HEADER, Layout, Part, Piece
from pylon_trainer.checkpoint.slab import Slab, Slabs
from pylon_trainer.checkpoint.staged import Mark, Staged
from pylon_trainer.errors import StorageError

WRITER_PATIENCE_SECONDS = 60.0
"""How long the optimizer may wait, when memory is short, for the writer to take one part."""


class PartWriter(Protocol):
    """What staging needs of a writer."""

    def part(self, upload: int, offset_in_file: int, offset_in_arena: int, length: int) -> None:
        """Tell it that a range of the arena holds this range of the upload's file. Called from the copier's thread;
        must not wait for I/O."""

    def listen(self, taken: Callable[[int, int], None], ended: Callable[[int], None]) -> None:
        """From now on call, from any thread: taken(upload, offset_in_file) once a part's range of the arena may be
        reused as far as this upload goes; ended(upload) once it reads no part any more (durable, failed, cancelled)."""


@dataclass(frozen=True, slots=True)
class _Target:
    """Where a piece goes: of the tensor's own dtype and shape when it is the whole of it, else bytes."""

    piece: Piece
    is_whole: bool
    view: Tensor


@dataclass(frozen=True, slots=True)
class _Range:
    """A part of the file in its place in the arena."""

    part: Part
    offset_in_arena: int
    targets: list[_Target]


class Staging:
    """The copier of one rank."""

    def __init__(
        self,
        device: torch.device,
        slabs: Slabs,
        writer: PartWriter,
        *,
        writer_patience_seconds: float = WRITER_PATIENCE_SECONDS,
    ) -> None:
        self._device = device
        self._slabs = slabs
        self._writer = writer
        self._patience_seconds = writer_patience_seconds
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._changed = threading.Condition()
        self._live: list[Staged] = []
        self._unreleased: Staged | None = None
        self._ranges_by_slab: dict[Slab, tuple[bytes, list[_Range]]] = {}
        self._orders: queue.SimpleQueue[Staged | None] = queue.SimpleQueue()
        writer.listen(self._taken, self._ended)
        self._copier = threading.Thread(target=self._copy_until_closed, name="checkpoint-copier", daemon=True)
        self._copier.start()

    def begin(self, tensors: Mapping[str, Tensor], layout: Layout, uploads: Iterable[int] = ()) -> Staged | None:
        """Copy these tensors as all work issued so far leaves them; None when no slab is free.

        tensors: those of the layout by name, on this device or the CPU. uploads: the writer's numbers of the files that
        the bytes are for, begun there already. Layouts are dear (5 us a tensor): make one and keep it.
        """
        self._slabs.window_bytes(layout.size_bytes)  # refuse what can never fit
        header = torch.frombuffer(bytearray(layout.header), dtype=torch.uint8)
        sources = {HEADER: header, **{name: tensors[name] for name in layout.places}}
        slab = self._slabs.take()
        if slab is None:
            return None
        staged = Staged(layout, sources, self._mark(), slab, self._slabs, uploads, self._changed)
        self._live = [*(earlier for earlier in self._live if not earlier.is_free), staged]
        self._unreleased = staged
        self._orders.put(staged)
        return staged

    def release(self) -> None:
        """Call before the tensors are written: what is issued after this comes after their copies.

        Raises what went wrong while copying, unless it is the writer's doing (see Staged.error).
        """
        staged, self._unreleased = self._unreleased, None
        if staged is None:
            return
        staged.issued.wait()
        if isinstance(staged.last_copy, torch.cuda.Event):
            torch.cuda.current_stream(self._device).wait_event(staged.last_copy)
        if staged.error is not None and not isinstance(staged.error, StorageError):
            raise staged.error

    def wait_for_slab(self, timeout_seconds: float | None) -> bool:
        """Wait until a save can begin; False when none could in this time. None sets no limit."""
        with self._changed:
            return self._changed.wait_for(lambda: self._slabs.has_free, timeout_seconds)

    def close(self, timeout_seconds: float) -> bool:
        """Cancel what is under way and end the thread. False when a device that hangs holds it: then the slabs must
        stay open."""
        for staged in self._live:
            staged.cancel()
        self._orders.put(None)
        self._copier.join(timeout_seconds)
        return not self._copier.is_alive()

    def _taken(self, upload: int, offset_in_file: int) -> None:
        for staged in self._live:
            staged.take(upload, offset_in_file)

    def _ended(self, upload: int) -> None:
        for staged in self._live:
            staged.end(upload)

    def _copy_until_closed(self) -> None:
        while (staged := self._orders.get()) is not None:
            with staged.keeping_errors():
                self._copy(staged)
            staged.finish()
            del staged  # not held while waiting for the next
        self._ranges_by_slab.clear()  # views of the arena

    def _copy(self, staged: Staged) -> None:
        under_way: deque[tuple[_Range, Mark]] = deque()
        with torch.no_grad(), self._side_stream(staged.ready):
            first = self._mark()
            with staged.keeping_errors():
                self._issue(staged, under_way)
            staged.last_copy = last = self._mark()
        staged.issued.set()
        with staged.keeping_errors():
            while under_way:
                self._hand_on(staged, *under_way.popleft())
        last.synchronize()  # after an error, copies may still be on their way into the slab
        if staged.error is None and not staged.is_cancelled:
            staged.copy_seconds = first.elapsed_time(last) / 1000

    def _issue(self, staged: Staged, under_way: deque[tuple[_Range, Mark]]) -> None:
        """Issue the copies of all parts, each as soon as nobody needs what was in its range of the slab."""
        _check(staged.sources, staged.layout)
        window_bytes = self._slabs.window_bytes(staged.layout.size_bytes)
        for range_ in self._ranges(staged.slab, staged.layout):
            previous = range_.part.offset - window_bytes
            while under_way and (under_way[0][0].part.offset <= previous or under_way[0][1].query()):
                self._hand_on(staged, *under_way.popleft())
            if not staged.wait_until_taken(previous, self._patience_seconds):
                raise StorageError(
                    f"the store took no part of a checkpoint for {self._patience_seconds:.0f} s, and host memory is "
                    "too short to go on without it; raise training.checkpoint.hostMemoryBytes"
                )
            if staged.is_cancelled:
                return
            sources = [_source(staged.sources[target.piece.name], target) for target in range_.targets]
            # One call for the whole part: Python's lock is let go while the copies are issued.
            torch._foreach_copy_([target.view for target in range_.targets], sources, non_blocking=True)
            under_way.append((range_, self._mark()))

    def _hand_on(self, staged: Staged, range_: _Range, copied: Mark) -> None:
        copied.synchronize()
        part = range_.part
        for upload in staged.uploads_without(part.offset):
            self._writer.part(upload, part.offset, range_.offset_in_arena, part.length)

    def _ranges(self, slab: Slab, layout: Layout) -> list[_Range]:
        """All parts of the file with views of the slab for their pieces; the same from save to save."""
        header, ranges = self._ranges_by_slab.get(slab, (b"", []))
        if header != layout.header:
            window_bytes = self._slabs.window_bytes(layout.size_bytes)
            ranges = []
            for part in layout.parts(self._slabs.part_bytes):
                offset = slab.offset + part.offset % window_bytes
                memory = self._slabs.arena.bytes[offset : offset + part.length]
                targets = [_target(piece, layout, memory, piece.offset - part.offset) for piece in part.pieces]
                ranges.append(_Range(part, offset, targets))
            self._ranges_by_slab[slab] = (layout.header, ranges)
        return ranges

    @contextmanager
    def _side_stream(self, ready: Mark) -> Iterator[None]:
        if self._stream is None or not isinstance(ready, torch.cuda.Event):
            yield
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            yield

    def _mark(self) -> Mark:
        """Record where the current stream is; waiting for the mark spins on no core."""
        if self._stream is None:
            return _Instant()
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class _Instant:
    """The mark of copies that are done when they return."""

    def __init__(self) -> None:
        self._seconds = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return

    def elapsed_time(self, end_event: Any) -> float:
        return float(end_event._seconds - self._seconds) * 1000


def _target(piece: Piece, layout: Layout, memory: Tensor, offset: int) -> _Target:
    view = memory[offset : offset + piece.length]
    place = layout.places.get(piece.name)
    if place is None or piece.length != place.size_bytes:
        return _Target(piece, False, view)
    return _Target(piece, True, view.view(getattr(torch, place.dtype)).view(place.shape))


def _source(tensor: Tensor, target: _Target) -> Tensor:
    """The piece of this tensor, as its target wants it."""
    if target.is_whole:
        return tensor
    begin = target.piece.begin
    return tensor.contiguous().view(-1).view(torch.uint8)[begin : begin + target.piece.length]


def _check(sources: Mapping[str, Tensor], layout: Layout) -> None:
    """ValueError when a tensor is not what was laid out: copying would convert or repeat it without a word."""
    for name, place in layout.places.items():
        tensor = sources[name]
        if tensor.dtype != getattr(torch, place.dtype) or tensor.shape != place.shape:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, but was laid out as {place.dtype} {place.shape}"
            )
