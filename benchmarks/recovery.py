"""From the death of a training process to the next step: `pylon run` of the quickstart, its worker killed with SIGKILL.

    python benchmarks/recovery.py [--kills 3] [--backoff-seconds 0]

Once a checkpoint is committed and training has gone on from it, the worker gets no chance to say goodbye. The clock
runs until the job reports a step of the next attempt beyond the checkpoint: the death is noticed, the gang restarts,
Python and torch are loaded again, the checkpoint is found, verified and restored, and a step is taken. The wait that a
job asks for before its first restart (failurePolicy.backoffSeconds, 10 if unset) is left out unless asked for. `pylon
run` looks twice a second, so half a second may be added to each.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from checkpoint_limits import family
from measure import RESULTS, publish

ROOT = Path(__file__).parents[1]


class PylonRun:
    """`pylon run` of a job in a directory, from this checkout."""

    def __init__(self, directory: Path, job: dict[str, Any]) -> None:
        (directory / "job.yaml").write_text(yaml.safe_dump(job))
        folders = os.pathsep.join(str(ROOT / folder) for folder in ("crds", "operator", "trainer"))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pylon_operator.cli", "run", "job.yaml", "--output", "json"],
            cwd=directory,
            env=os.environ | {"PYTHONPATH": folders},
            stdout=subprocess.PIPE,
            text=True,
        )

    def statuses(self) -> Iterator[dict[str, Any]]:
        """The job's status each time that it is told. Exits when the job ends."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            status: dict[str, Any] = json.loads(line).get("status") or {}
            if status.get("training"):
                yield status
        sys.exit(f"the job ended with {self._process.wait()} before all kills were done; it needs more steps")

    def worker(self) -> int:
        """pid of its only rank."""
        return next(pid for pid in family(self._process.pid) if "pylon_trainer.worker" in _arguments(pid))

    def end(self) -> None:
        """And with it all that it started."""
        self._process.kill()
        self._process.wait()


def _arguments(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:  # it has ended
        return []


def seconds_to_next_step(run: PylonRun, statuses: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Kill once a step has been taken after a checkpoint that was committed in this attempt."""
    first = next(statuses)
    before = next(
        status
        for status in statuses
        if committed(status) > committed(first) and status["training"]["step"] > committed(status)
    )
    os.kill(run.worker(), signal.SIGKILL)
    killed = time.perf_counter()
    reached = before["training"]["step"]
    after = next(
        status
        for status in statuses
        if status["attempt"] > before["attempt"] and reached != status["training"]["step"] > committed(status)
    )
    seconds = time.perf_counter() - killed
    return {
        "killed_at_step": reached,
        "restored_step": committed(after),
        "lost_steps": reached - committed(after),
        "kill_to_step_s": seconds,
    }


def committed(status: dict[str, Any]) -> int:
    return int(status.get("checkpoint", {}).get("step", 0))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the time from a killed worker to the next step.")
    parser.add_argument("--kills", type=int, default=3, help="that count (default 3)")
    parser.add_argument("--backoff-seconds", type=int, default=0, help="failurePolicy.backoffSeconds (default 0)")
    parser.add_argument("--interval-steps", type=int, help="of checkpoints; default: the quickstart's")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory for the JSON file")
    arguments = parser.parse_args()
    job = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text())
    job["spec"]["failurePolicy"] = {"backoffSeconds": arguments.backoff_seconds}
    checkpoint = job["spec"]["training"]["checkpoint"]
    checkpoint["intervalSteps"] = arguments.interval_steps or checkpoint["intervalSteps"]
    with tempfile.TemporaryDirectory() as directory:
        run = PylonRun(Path(directory), job)
        try:
            statuses = run.statuses()
            rows = [
                seconds_to_next_step(run, statuses) | {"backoff_s": arguments.backoff_seconds}
                for _ in range(arguments.kills)
            ]
        finally:
            run.end()
    publish("recovery", rows, arguments.results, timing="wall clock, polled every 0.5 s")
    median = statistics.median(row["kill_to_step_s"] for row in rows)
    print(f"kill to next step {median:.1f} s (goal 10 s)")


if __name__ == "__main__":
    main()
