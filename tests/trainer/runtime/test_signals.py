"""One request to stop waits for a good moment; a second one does not."""

from __future__ import annotations

import ctypes
import os
import signal
import threading

import pytest
from gangs import fork, wait

from pylon_trainer.runtime import signals
from pylon_trainer.runtime.signals import StopFlag, die_with_parent


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that StopFlag sees: the last entry. Signals are handed to it by hand."""
    now = [100.0]
    monkeypatch.setattr(signals, "listen", lambda *_: None)
    monkeypatch.setattr("pylon_trainer.runtime.signals.time.monotonic", lambda: now[-1])
    return now


def test_before_anyone_can_wait_a_stop_is_obeyed_at_once(clock: list[float]) -> None:
    said: list[str] = []
    StopFlag(said.append)._hear(signal.SIGTERM)
    assert said == ["asked to stop before training began"]


@pytest.mark.parametrize(("seconds", "expected"), [(0.5, []), (1.5, ["asked to stop twice: left without saving"])])
def test_the_same_request_heard_twice_is_one_and_a_later_one_is_a_second(
    clock: list[float], seconds: float, expected: list[str]
) -> None:
    said: list[str] = []
    flag = StopFlag(said.append)
    flag.defer()
    assert not flag.is_set()
    flag._hear(signal.SIGINT)
    assert (flag.is_set(), said) == (True, [])
    clock.append(100 + seconds)
    flag._hear(signal.SIGTERM)
    assert said == expected


def test_a_signal_is_heard_while_the_main_thread_runs_no_bytecode() -> None:
    """As in a collective: a handler of Python's would run only once the call into C returns."""

    def run() -> None:
        StopFlag(at_once=lambda _: os._exit(7))
        main = os.getpid()
        threading.Timer(0.01, lambda: os.kill(main, signal.SIGTERM)).start()
        mutex = ctypes.create_string_buffer(128)
        for _ in range(2):  # the second lock of a mutex waits for ever, and no signal ends the wait
            ctypes.CDLL(None).pthread_mutex_lock(mutex)

    assert wait(fork(run)) == 7


def test_a_worker_ends_with_its_launcher() -> None:
    reader, writer = os.pipe()

    def launch() -> None:
        def work() -> None:
            die_with_parent()
            os.write(writer, b"r")
            signal.pause()

        os.close(reader)
        fork(work)
        signal.pause()

    launcher = fork(launch)
    os.close(writer)
    assert os.read(reader, 1) == b"r"
    os.kill(launcher, signal.SIGKILL)
    assert wait(launcher) == 128 + signal.SIGKILL
    assert os.read(reader, 1) == b""  # the last holder of the pipe's other end is gone
    os.close(reader)
