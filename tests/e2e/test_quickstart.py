"""The examples for one machine through the real command line and the real trainer, made small enough for a test."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest
import yaml

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]


def scaled_down(name: str = "quickstart", *, steps: int, interval: int, layers: int = 1) -> dict[str, Any]:
    """An example with a model, data and a duration that a test can afford."""
    job: dict[str, Any] = yaml.safe_load((ROOT / "examples" / f"{name}.yaml").read_text())
    training = job["spec"]["training"]
    training["model"] |= {"layers": layers, "hiddenSize": 32, "heads": 2}
    training["data"] |= {"train": ["python://stdlib/json/*.py"], "sequenceLength": 32, "heldOutFraction": 0.3}
    training["schedule"] = {"steps": steps, "warmupSteps": 2}
    training["batch"] = {"sequences": 4}
    training["optimizer"] = {"learningRate": 0.01}
    training["checkpoint"]["intervalSteps"] = interval
    training["evaluation"] |= {"intervalSteps": interval, "sequences": 4, "sampleTokens": 20}
    training["logIntervalSteps"] = 5
    job["spec"]["failurePolicy"] = {"backoffSeconds": 0}
    return job


class PylonRun:
    """One `pylon run`, as a person or a script would start it."""

    def __init__(self, directory: Path, *options: str) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("crds", "operator", "trainer")),
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pylon_operator.cli", "run", "job.yaml", *options],
            cwd=directory,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.status: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # and with it all that it started
        self._process.wait()

    def follow(self, seen: Callable[[dict[str, Any]], Any]) -> None:
        """Reads the JSON output until a status for which `seen` is true."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.status = json.loads(line).get("status", self.status)
            if self.status and seen(self.status):
                return
        pytest.fail(f"the run ended with {self._process.wait()} before that; last status: {self.status}")

    def finish(self) -> tuple[int, str]:
        """Exit code and the rest of the output."""
        output, _ = self._process.communicate()
        return self._process.returncode, output

    def send(self, number: signal.Signals) -> None:
        """A signal to `pylon run` itself."""
        self._process.send_signal(number)

    def processes(self) -> dict[int, str]:
        """pid and command line of everything below `pylon run`."""
        table = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True)
        rows = [line.split(None, 2) for line in table.stdout.splitlines()]
        below, found = {self._process.pid}, {}
        for _ in rows:  # as many rounds as the tree could be deep
            children = {int(pid): args for pid, parent, args in rows if int(parent) in below and int(pid) not in found}
            if not children:
                break
            found |= children
            below |= set(children)
        return found


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    table = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(table.stdout.strip()) and not table.stdout.startswith("Z")


def saved(directory: Path, name: str = "quickstart") -> dict[str, Any]:
    """The resource as it stands on disk."""
    job: dict[str, Any] = json.loads((directory / f".pylon/default/{name}/status.json").read_text())
    return job


def committed(status: dict[str, Any]) -> int:
    """Step of the newest committed checkpoint."""
    return int(status.get("checkpoint", {}).get("step", 0))


def trained(status: dict[str, Any]) -> int:
    """Step that training has reached."""
    return int(status.get("training", {}).get("step", 0))


def test_the_loss_falls_and_everything_is_left_behind(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(scaled_down(steps=40, interval=20)))
    with PylonRun(tmp_path, "--output", "plain") as run:
        code, output = run.finish()
    assert code == 0, output
    log = (tmp_path / ".pylon/default/quickstart/logs/quickstart-a1-0.log").read_text()
    losses = [float(found) for found in re.findall(r"\bloss=([\d.]+)", log)]
    assert losses[-1] < losses[0] - 0.3
    assert "default/quickstart succeeded" in output
    assert "Sample" in output
    status = saved(tmp_path)["status"]
    assert status["training"]["step"] == status["training"]["totalSteps"] == 40
    assert status["training"]["heldOutLoss"] < 5.0  # an untrained model: ln 257 = 5.55
    checkpoint = tmp_path / status["checkpoint"]["uri"]
    assert (checkpoint / "COMMITTED").is_file()
    assert list((tmp_path / "runs").rglob("export/model.safetensors"))


def test_resonate_on_two_processes_learns_within_its_budget_of_bytes(tmp_path: Path) -> None:
    job = scaled_down("resonate", steps=60, interval=30, layers=2)  # one scans, one attends
    training = job["spec"]["training"]
    training["consensus"]["bytesPerStep"] = 8_000
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    with PylonRun(tmp_path, "--output", "plain") as run:
        code, output = run.finish()
    assert code == 0, output
    status = saved(tmp_path, "resonate")["status"]
    assert status["training"]["step"] == 60
    assert status["training"]["heldOutLoss"] < 4.5  # an untrained model: ln 257 = 5.55
    assert 0 < status["training"]["bytesPerStep"] <= 8_000, "gradients are 193 kB in float32"


def test_a_job_survives_what_happens_to_it(tmp_path: Path) -> None:
    """One job: its pod is killed, then the user stops it, then `pylon run` is killed; then it completes."""
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(scaled_down(steps=2000, interval=50)))

    with PylonRun(tmp_path, "--output", "json") as run:
        run.follow(lambda status: committed(status) >= 50)
        before = committed(run.status)
        os.kill(process_1(run), signal.SIGKILL)
        run.follow(lambda status: status["attempt"] == 2 and committed(status) > before)
        assert run.status["failures"][0]["exitCode"] == 137
        assert run.status["restarts"] == 1
        asked_at = trained(run.status)
        run.send(signal.SIGINT)
        assert run.finish()[0] == 75
    status = saved(tmp_path)["status"]
    assert status["phase"] == "Suspended"
    assert committed(status) >= asked_at

    uid, kept = saved(tmp_path)["metadata"]["uid"], committed(status)
    with PylonRun(tmp_path, "--output", "json") as run:
        run.follow(lambda status: status["phase"] == "Running" and committed(status) > kept)
        everything = run.processes()
        assert any("pylon_trainer.worker" in args for args in everything.values())
        run.send(signal.SIGKILL)
        run.finish()
    deadline = time.monotonic() + 30
    while left := [args for pid, args in everything.items() if alive(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)

    with PylonRun(tmp_path, "--output", "plain") as run:
        code, output = run.finish()
    assert code == 0, output
    job = saved(tmp_path)
    assert job["metadata"]["uid"] == uid
    assert trained(job["status"]) == 2000
    assert (job["status"]["attempt"], job["status"]["restarts"]) == (4, 1)


def process_1(run: PylonRun) -> int:
    """pid of the only pod's process 1."""
    return next(
        pid
        for pid, args in run.processes().items()
        if args.endswith("-m pylon_trainer.launcher") and "reaper.py" not in args
    )
