"""A rank that is killed, at any point, takes its gang down within seconds, and the pods say whose fault it was."""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gangs import run_pod, start_gang

from pylon_api import names
from pylon_api.names import ExitCode
from pylon_trainer import worker
from pylon_trainer.checkpoint.destination import Destination
from pylon_trainer.checkpoint.saver import Saver
from pylon_trainer.checkpoint.writer_handle import WriterHandle
from pylon_trainer.consensus.exact import ExactExchange
from pylon_trainer.consensus.local_steps import LocalSteps
from pylon_trainer.run import Run
from pylon_trainer.runtime import stalls

MakeConfig = Callable[..., dict[str, Any]]


def die_in(
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    method: str,
    *,
    rank: str = "1",
    call: int = 1,
    by: signal.Signals = signal.SIGKILL,
) -> None:
    """Have one rank killed, or frozen, as it enters a method for the n-th time."""
    original = getattr(owner, method)
    calls = 0

    def patched(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if os.environ["RANK"] == rank and calls == call:
            os.kill(os.getpid(), by)
        return original(*arguments, **named)

    monkeypatch.setattr(owner, method, patched)


LOST = [
    pytest.param(Saver, "restore", 1, id="before the first step"),
    pytest.param(Run, "advance", 3, id="between batch and backward"),
    pytest.param(ExactExchange, "exchange", 3, id="between backward and exchange"),
    pytest.param(Saver, "_begin", 1, id="before a checkpoint"),
    pytest.param(Destination, "_commit", 1, id="before a commit"),
    pytest.param(Saver, "finish", 1, id="before the end"),
]


@pytest.mark.parametrize(("owner", "method", "call"), LOST)
def test_when_a_pod_is_lost_the_other_leaves_within_seconds(
    tmp_path: Path,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    method: str,
    call: int,
) -> None:
    die_in(monkeypatch, owner, method, call=call)
    first, second = start_gang(tmp_path, make_config(nodes=2, processes=1))
    assert second.wait() == 128 + signal.SIGKILL
    killed_time = time.monotonic()
    assert first.wait() == ExitCode.PEER_LOST, first.log
    assert time.monotonic() - killed_time < 10
    assert (second.report.reason, second.report.rank, second.report.final) == ("SIGKILL", 1, None)
    assert (first.report.reason, first.report.rank) == ("PeerLost", 0)
    assert "died" in first.report.message
    assert first.final.uid == "12345678-90ab"


@pytest.mark.parametrize("call", random.Random(0).sample(range(1, 60_000), 4))
def test_a_kill_at_any_moment_hangs_nobody(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Counted in calls of Python functions since the gang met, which a seed can draw and a person repeat."""
    train = worker.train

    def patched(*arguments: Any) -> None:
        if os.environ["RANK"] == "1":
            calls = itertools.count(1)
            sys.setprofile(lambda *_: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == call else None)
        train(*arguments)

    monkeypatch.setattr(worker, "train", patched)
    first, second = start_gang(tmp_path, make_config(nodes=2, processes=1, schedule={"steps": 100_000}))
    assert second.wait() == 128 + signal.SIGKILL
    assert first.wait() == ExitCode.PEER_LOST, first.log


def test_rank_0_killed_while_it_saves_leaves_no_checkpoint(
    tmp_path: Path, make_config: MakeConfig, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    die_in(monkeypatch, WriterHandle, "commit", rank="0")
    codes = [pod.wait() for pod in start_gang(tmp_path, make_config(nodes=2, processes=1))]
    assert codes == [128 + signal.SIGKILL, ExitCode.PEER_LOST]
    assert not list(checkpoints.glob("step-*/COMMITTED"))


def test_in_one_pod_the_killed_rank_explains_the_end(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    die_in(monkeypatch, Run, "advance", call=3)
    exit_code, pod = run_pod(tmp_path, make_config())
    assert exit_code == 128 + signal.SIGKILL
    assert (pod.report.rank, pod.report.message) == (1, "rank 1 ended with SIGKILL and said nothing")
    assert pod.final.step == 2
    assert pod.log.count("pylon: SIGKILL (rank 1)") == 1


def test_a_peer_that_is_stuck_outside_of_any_collective_notices_too(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a rank that waits for its GPU, which waits for the dead peer's."""
    advance = Run.advance

    def patched(run: Run, *arguments: Any) -> Any:
        if run.step == 2:
            if run.world.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            threading.Event().wait()
        return advance(run, *arguments)

    monkeypatch.setattr(Run, "advance", patched)
    first, second = start_gang(tmp_path, make_config(nodes=2, processes=1))
    assert second.wait() == 128 + signal.SIGKILL
    assert first.wait() == ExitCode.PEER_LOST
    assert first.report.message == "rank 1 died or its machine vanished"


@pytest.mark.parametrize(
    ("frozen", "owner", "method", "local_steps"),
    [(0, ExactExchange, "exchange", 1), (1, ExactExchange, "exchange", 1), (1, LocalSteps, "after_update", 2)],
)
def test_a_peer_that_is_frozen_is_given_up_after_the_timeout_and_named(
    tmp_path: Path,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    frozen: int,
    owner: type,
    method: str,
    local_steps: int,
) -> None:
    monkeypatch.setattr(stalls, "GRACE_SECONDS", 1.0)
    die_in(monkeypatch, owner, method, rank=str(frozen), call=3, by=signal.SIGSTOP)
    timeout = {names.ENV_COLLECTIVE_TIMEOUT_SECONDS: "3"}
    fields = {"batch": {"sequences": 6}, "consensus": {"localSteps": local_steps}}
    pods = start_gang(tmp_path, make_config(nodes=3, processes=1, **fields), timeout)
    others = [pod for rank, pod in enumerate(pods) if rank != frozen]
    assert [pod.wait() for pod in others] == [ExitCode.PEER_LOST] * 2, others[0].log
    assert any(pod.report.message.startswith(f"rank {frozen} fell silent: ") for pod in others)
    os.kill(pods[frozen].pid, signal.SIGKILL)  # and with the launcher its frozen worker
    assert pods[frozen].wait() == 128 + signal.SIGKILL
