"""Hears signals even while the main thread waits inside a collective or a constructor written in C++.

Python runs its own handlers only between bytecodes of the main thread; the wake-up descriptor is written at once
(https://docs.python.org/3/library/signal.html#signal.set_wakeup_fd), so a thread of ours reads that.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
STOPPED_EARLY = "asked to stop before training began"

_SAME_REQUEST_SECONDS = 1.0
"""Ctrl-C reaches a whole process group and is forwarded by the launcher too: that is one request, not two."""

_PR_SET_PDEATHSIG = 1


def listen(signals: Iterable[signal.Signals], heard: Callable[[int], None]) -> None:
    """Call `heard(signal number)` in a thread for every such signal from now on. Main thread only."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in signals:
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def read() -> None:
        while True:
            for number in os.read(reader, 64):
                heard(number)

    threading.Thread(target=read, name="signals", daemon=True).start()


class StopFlag:
    """Set by SIGTERM or SIGINT, for someone who will stop at the next good moment.

    Until `defer` says that there is such a someone, and when asked a second time, `at_once` is called instead.
    """

    def __init__(self, at_once: Callable[[str], object]) -> None:
        """Begin to listen; at_once(why) should not return. Main thread only."""
        self._at_once = at_once
        self._deferred = False
        self._first_time: float | None = None
        listen(STOP_SIGNALS, self._hear)

    def defer(self) -> None:
        """From now on the first signal only sets the flag."""
        self._deferred = True

    def is_set(self) -> bool:
        """Whether someone asked to stop."""
        return self._first_time is not None

    @property
    def age_seconds(self) -> float | None:
        """Since someone asked to stop; None when nobody did."""
        return None if self._first_time is None else time.monotonic() - self._first_time

    def _hear(self, _: int) -> None:
        now = time.monotonic()
        if not self._deferred:
            self._at_once(STOPPED_EARLY)
        elif self._first_time is None:
            self._first_time = now
        elif now - self._first_time > _SAME_REQUEST_SECONDS:
            self._at_once("asked to stop twice: left without saving")


def die_with_parent() -> None:
    """Have the kernel kill this process when its launcher dies, so that no orphan keeps a GPU. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
