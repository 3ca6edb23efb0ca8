"""The writer in a process of its own: `python -m pylon_trainer.checkpoint.writer_process`, started by its rank.

Clients of object stores hold the interpreter's lock, and would slow the loop that launches kernels. The process maps
the rank's arena, imports no torch and dies with the rank: EOF and the kernel see to that. Signals do not end it,
because the one that stops a job reaches its whole process group, and the save that follows needs a writer.
"""

from __future__ import annotations

import logging
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from queue import SimpleQueue
from typing import NoReturn, Protocol

from pylon_trainer.checkpoint.orders import Answer, Order
from pylon_trainer.checkpoint.writer import Writer
from pylon_trainer.runtime.signals import STOP_SIGNALS, die_with_parent


class SharedArena(Protocol):
    """Memory that a child can map by its descriptor."""

    @property
    def fd(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def buffer(self) -> memoryview: ...


class WriterProcess:
    """A writer that is started at once and again after it died. Its methods wait for nothing but their own time."""

    def __init__(
        self,
        arena: SharedArena,
        answer: Callable[[Answer], None],
        died: Callable[[str], None],
        is_wanted: Callable[[Order], bool],
    ) -> None:
        """answer, died: called from a thread of this object; died says why no order given so far will be answered any
        more. is_wanted: whether an order still stands when it is about to be sent."""
        self._arena = arena
        self._answer = answer
        self._died = died
        self._is_wanted = is_wanted
        self._orders: SimpleQueue[Order | None] = SimpleQueue()
        self._closing_seconds = 0.0
        self._life: _Life | None = None
        # The kernel ties a child to the thread that started it (prctl(2), PR_SET_PDEATHSIG), so one thread starts all.
        self._feeder = threading.Thread(target=self._feed, name="writer-feeder", daemon=True)
        self._feeder.start()

    def handle(self, order: Order) -> None:
        """Send an order, in a thread."""
        self._orders.put(order)

    @property
    def pid(self) -> int | None:
        """Of the process that lives; None between two."""
        life = self._life
        return None if life is None or life.is_over else life.process.pid

    def close(self, timeout_seconds: float) -> bool:
        """Have it give up what is under way and end. False when it had to be killed."""
        self._closing_seconds = timeout_seconds
        self._orders.put(None)
        self._feeder.join(timeout_seconds)
        if is_late := self._feeder.is_alive():
            if self._life is not None:
                self._life.process.kill()
            self._feeder.join()
        return not is_late

    def _feed(self) -> None:
        self._start()
        while (order := self._orders.get()) is not None:
            if not self._is_wanted(order):
                continue
            if self._life is None or self._life.is_over:
                self._start()
            if self._life is not None:
                self._life.send(order)
        if self._life is not None:
            self._life.end(self._closing_seconds)

    def _start(self) -> None:
        if self._life is not None:
            self._life.end(0)
        try:
            self._life = _Life(self._arena, self._answer, self._died)
        except OSError as error:
            self._life = None
            self._died(f"the writer process cannot be started: {error}")


class _Life:
    """One process, from start to end."""

    def __init__(self, arena: SharedArena, answer: Callable[[Answer], None], died: Callable[[str], None]) -> None:
        self._answer = answer
        self._died = died
        self.is_over = False
        orders, self._orders = Pipe(duplex=False)
        self._answers, answers = Pipe(duplex=False)
        inherited = (orders.fileno(), answers.fileno(), arena.fd)
        command = [sys.executable, "-P", "-m", __spec__.name, *map(str, (*inherited, arena.size_bytes, os.getpid()))]
        try:
            self.process = subprocess.Popen(  # noqa: S603
                command,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},  # as this process has it
                stdin=subprocess.DEVNULL,
                pass_fds=inherited,
                start_new_session=True,  # Ctrl-C before it can ignore signals would end it
            )
        except OSError:
            self._orders.close()
            self._answers.close()
            raise
        finally:
            orders.close()
            answers.close()
        self._reader = threading.Thread(target=self._read, name="writer-answers", daemon=True)
        self._reader.start()

    def send(self, order: Order | None) -> None:
        try:
            self._orders.send(order)
        except OSError:
            return  # it died; the reader says so

    def end(self, timeout_seconds: float) -> None:
        """Wait for its end, or bring it about."""
        self.send(None)
        try:
            self.process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self._reader.join()
        self._orders.close()
        self._answers.close()

    def _read(self) -> None:
        try:
            while True:
                self._answer(self._answers.recv())
        except (EOFError, OSError):
            code = self.process.wait()
        self.is_over = True  # before anyone is told: an order that comes later then finds a new process
        ending = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        self._died(f"the writer process ended {ending}; the next save starts a new one")


def main(orders_fd: int, answers_fd: int, arena_fd: int, arena_bytes: int, parent: int) -> NoReturn:
    """Carry out orders until told to end, or until the rank is gone."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
    if os.getppid() != parent:
        os._exit(0)
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
    orders, answers = Connection(orders_fd, writable=False), Connection(answers_fd, readable=False)
    arena = mmap.mmap(arena_fd, arena_bytes, prot=mmap.PROT_READ)
    os.close(arena_fd)
    sending = threading.Lock()

    def answer(what: Answer) -> None:
        with sending:
            answers.send(what)

    writer = Writer(memoryview(arena), answer)
    try:
        while (order := orders.recv()) is not None:
            writer.handle(order)
        writer.close(_CLEAN_UP_SECONDS)
    except EOFError:
        pass  # the rank died: what is unfinished can never be committed
    sys.stdout.flush()
    os._exit(0)  # without waiting for threads and connections that may never end


_CLEAN_UP_SECONDS = 600.0
"""No limit of its own: who ordered the end kills when its time is over."""

if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
