"""What a person sees of the gate and of checkpoints while a job runs on this machine."""

from __future__ import annotations

import io
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from operator_builders import a_job
from rich.console import Console

from pylon_api.job import PylonJob, TrainingProgress
from pylon_api.run import CheckpointReport, GateDecision, GateReport, SaveReport
from pylon_operator.local.state import JobDirectory
from pylon_operator.local.summary import print_summary
from pylon_operator.local.view import LiveView, PlainView, View

WORDS = "gradient mass 0.93 at ratio 0.5"
GATED = GateReport(decision=GateDecision.GATED, reason=WORDS, ratio=0.5, saved_flops_ratio=0.31)
PLAIN = GateReport(decision=GateDecision.PLAIN, reason="a gated step would take longer", ratio=1)


def a_running_job(gate: GateReport | None = None, saves: SaveReport | None = None, **status: Any) -> PylonJob:
    job = a_job()
    status["training"] = TrainingProgress(step=5, total_steps=10, loss=2.5, gate=gate, saves=saves)
    return job.model_copy(update={"status": job.status.model_copy(update=status)})


def shown(make: Callable[[Console], View], job: PylonJob) -> str:
    """All that a view wrote of this job."""
    output = io.StringIO()
    with make(Console(file=output, width=110, force_terminal=True, color_system=None)) as view:
        view.update(job, None)
    return output.getvalue()


@pytest.mark.parametrize(
    ("view", "gate", "said"),
    [
        (PlainView, GATED, "loss 2.500  gate 0.50"),
        (PlainView, PLAIN, "loss 2.500  gate plain"),
        (LiveView, GATED, f"gated, spares 31% of a step's FLOPs: {WORDS}"),
        (LiveView, PLAIN, "plain: a gated step would take longer"),
    ],
)
def test_the_gate_is_shown_with_its_reason(view: Callable[[Console], View], gate: GateReport, said: str) -> None:
    assert said in shown(view, a_running_job(gate))


@pytest.mark.parametrize("view", [PlainView, LiveView])
def test_without_a_gate_nothing_is_said_of_one(view: Callable[[Console], View]) -> None:
    assert "gate" not in shown(view, a_running_job())


def summary(job: PylonJob, directory: Path) -> str:
    output = io.StringIO()
    console = Console(file=output, width=200, color_system=None)
    print_summary(console, job, None, JobDirectory(directory), "pylon run job.yaml")
    return output.getvalue()


@pytest.mark.parametrize(
    ("age", "said"),
    [
        (timedelta(seconds=5), "step 400, 1.2 GB (5 s ago)"),
        (timedelta(seconds=119), "step 400, 1.2 GB (119 s ago)"),
        (timedelta(minutes=90), "step 400, 1.2 GB (90 min ago)"),
        (timedelta(hours=30), "step 400, 1.2 GB (30 h ago)"),
        (timedelta(days=9), "step 400, 1.2 GB (9 d ago)"),
        (None, "step 400, 1.2 GB"),
    ],
)
def test_the_checkpoint_is_shown_with_its_size_and_age(age: timedelta | None, said: str, tmp_path: Path) -> None:
    time = None if age is None else datetime.now(UTC) - age
    checkpoint = CheckpointReport(step=400, uri="./runs/step-400", size_bytes=1_200_000_000, committed_time=time)
    job = a_running_job(checkpoint=checkpoint)
    assert f"checkpoint at {said} ·" in shown(LiveView, job)
    assert f"checkpoint  {said}  ./runs/step-400" in summary(job, tmp_path)


@pytest.mark.parametrize(("row", "which"), [(1, "the last save failed"), (3, "the last 3 saves failed")])
def test_failing_saves_stay_in_sight(row: int, which: str, tmp_path: Path) -> None:
    job = a_running_job(saves=SaveReport(failed=5, failed_in_row=row, failure="cannot write ./runs: no space left"))
    assert f"{which}: cannot write ./runs: no space left" in shown(LiveView, job)
    assert f"{which}: cannot write ./runs: no space left" in summary(job, tmp_path)
    assert "failed" not in shown(LiveView, a_running_job(saves=SaveReport(committed=1, failed=5)))
