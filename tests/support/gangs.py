"""Whole gangs for tests: real launchers, workers, signals and gloo, but most of them forked from the test's process.

Forking spares every process the import of torch, and lets a test change what a worker does by patching it first: a
rank that dies at an exact point needs no sleeps. test_launcher.py starts one gang as pods do, by command line.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pylon_api import names
from pylon_api.run import RunConfig, TerminationReport, TrainerStatus
from pylon_trainer import launcher, worker
from pylon_trainer.checkpoint.saver import Saver
from pylon_trainer.checkpoint.writer_handle import WriterHandle
from pylon_trainer.runtime import processes

DEADLINE_SECONDS = 90.0
"""A gang that has not ended by then hangs; generous, because test machines are busy."""

SPAWNED_DEADLINE_SECONDS = 180.0
"""More, because each process imports torch by itself and may compile kernels for the device."""


def fork(run: Callable[[], Any]) -> int:
    """Run something in a child that never returns into the test. Returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        run()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(3)


def wait(pid: int) -> int:
    """Exit code as a shell has it. Kills the process and fails when it hangs."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return 128 - code if code < 0 else code
        time.sleep(0.02)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"process {pid} hangs")


class ForkedWorker:
    """What run_workers uses of a Popen."""

    def __init__(self, config: RunConfig, rank: int, master: tuple[str, int]) -> None:
        environment = processes.worker_environment(config, rank, master)

        def run() -> None:
            logging.root.handlers.clear()
            os.environ.update(environment)
            worker.main()

        self.pid = fork(run)
        self._status: int | None = None

    def poll(self) -> int | None:
        if self._status is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if ended else None
        return self._status

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


@dataclass(frozen=True)
class Pod:
    """One pod of a gang that has been started."""

    pid: int
    directory: Path

    def wait(self) -> int:
        return wait(self.pid)

    @property
    def report(self) -> TerminationReport:
        return TerminationReport.model_validate_json((self.directory / "termination").read_bytes())

    @property
    def final(self) -> TrainerStatus:
        assert self.report.final is not None
        return self.report.final

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()

    def values(self, name: str) -> dict[int, str]:
        """A value of the log lines, by step."""
        lines = [dict(part.split("=", 1) for part in line.split() if "=" in part) for line in self.log.splitlines()]
        return {int(line["step"]): line[name] for line in lines if "step" in line and name in line}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pod_environment(directory: Path, node_rank: int, rendezvous_port: int) -> dict[str, str]:
    """What the operator would set."""
    return {
        names.ENV_CONFIG: str(directory / "run.json"),
        names.ENV_SCRATCH: str(directory / "scratch"),
        names.ENV_TERMINATION_LOG: str(directory / "termination"),
        names.ENV_TOKEN_FILE: str(directory / "token"),
        names.ENV_TOPOLOGY_FILE: str(directory / "topology"),
        names.ENV_STATUS_HOST: "127.0.0.1",
        names.ENV_STATUS_PORT: str(free_port()),
        names.ENV_GRACE_SECONDS: "30",
        "PET_NODE_RANK": str(node_rank),
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": str(rendezvous_port),
        "OMP_NUM_THREADS": "1",
    }


def prepare_pod(directory: Path, config: dict[str, Any]) -> None:
    directory.mkdir(parents=True)
    (directory / "run.json").write_text(RunConfig.model_validate(config).model_dump_json(by_alias=True))
    (directory / "token").write_text("secret")


def start_gang(directory: Path, config: dict[str, Any], environment: dict[str, str] | None = None) -> list[Pod]:
    """Fork the pods of one attempt; each has a directory of its own below this one."""
    port = free_port()
    pods = []
    for node_rank in range(config["nodes"]):
        place = directory / f"attempt-{config['attempt']}-pod-{node_rank}"
        prepare_pod(place, config)
        variables = pod_environment(place, node_rank, port) | (environment or {})

        def run(place: Path = place, variables: dict[str, str] = variables) -> None:
            os.setsid()
            with (place / "log").open("wb", buffering=0) as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            logging.root.handlers.clear()
            os.environ.update(variables)
            processes.start_worker = ForkedWorker  # type: ignore[assignment]
            launcher.main()

        pods.append(Pod(fork(run), place))
    return pods


def spawn_pod(directory: Path, config: dict[str, Any]) -> subprocess.Popen[str]:
    """A pod of its own, as a container runs it: nothing of this process is in it."""
    prepare_pod(directory, config)
    variables = pod_environment(directory, 0, free_port()) | {"PYTHONPATH": ":".join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, "-m", "pylon_trainer.launcher"],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run_spawned_pod(directory: Path, config: dict[str, Any]) -> tuple[int, Pod]:
    """Spawn a pod and wait for it: for runs on a device, which nothing forked from a process that used it can use."""
    process = spawn_pod(directory, config)
    try:
        output, errors = process.communicate(timeout=SPAWNED_DEADLINE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        raise AssertionError(f"the pod in {directory} hangs:\n{output}{errors}") from None
    (directory / "log").write_text(output + errors)
    return process.returncode, Pod(process.pid, directory)


def save_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every checkpoint committed before the next step begins, so that a test can say which there are: steps of
    such tiny models are shorter than the writing of a file."""
    end_step = Saver.end_step

    def patched(saver: Saver, training_seconds: float) -> None:
        end_step(saver, training_seconds)
        if saver._pipeline is not None:
            saver._drain(saver._pipeline)

    monkeypatch.setattr(Saver, "end_step", patched)


def write_within(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have workers write checkpoints in threads of their own, where a test can change what a store does."""
    monkeypatch.setattr(WriterHandle, "open", lambda arena, _: WriterHandle.in_thread(arena))


def run_gang(directory: Path, config: dict[str, Any], environment: dict[str, str] | None = None) -> list[int]:
    """Start a gang and wait for it; the pods' exit codes."""
    return [pod.wait() for pod in start_gang(directory, config, environment)]


def run_pod(directory: Path, config: dict[str, Any], environment: dict[str, str] | None = None) -> tuple[int, Pod]:
    """Start a gang of one pod and wait for it."""
    (pod,) = start_gang(directory, config, environment)
    return pod.wait(), pod
