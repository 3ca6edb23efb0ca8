"""What a person sees of the gate while a job runs on this machine."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from operator_builders import a_job
from rich.console import Console

from pylon_api.job import TrainingProgress
from pylon_api.run import GateDecision, GateReport
from pylon_operator.local.view import LiveView, PlainView, View

WORDS = "gradient mass 0.93 at ratio 0.5"
GATED = GateReport(decision=GateDecision.GATED, reason=WORDS, ratio=0.5, saved_flops_ratio=0.31)
PLAIN = GateReport(decision=GateDecision.PLAIN, reason="a gated step would take longer", ratio=1)


def shown(make: Callable[[Console], View], gate: GateReport | None) -> str:
    """All that a view wrote of a job with this gate."""
    job = a_job()
    training = TrainingProgress(step=5, total_steps=10, loss=2.5, gate=gate)
    job = job.model_copy(update={"status": job.status.model_copy(update={"training": training})})
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
    assert said in shown(view, gate)


@pytest.mark.parametrize("view", [PlainView, LiveView])
def test_without_a_gate_nothing_is_said_of_one(view: Callable[[Console], View]) -> None:
    assert "gate" not in shown(view, None)
