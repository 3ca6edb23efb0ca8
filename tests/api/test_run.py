"""What one version says, the next one reads: reports of a trainer and status on record from before there was a gate."""

from __future__ import annotations

import pytest

from pylon_api.job import PylonJobStatus
from pylon_api.run import GateDecision, GateReport, TerminationReport, TrainerStatus

BEFORE = {"uid": "u", "attempt": 1, "phase": "Training", "step": 7, "loss": 2.5, "tokenRatio": 0.5}


def test_a_status_from_before_the_gate_is_read_without_one() -> None:
    status = TrainerStatus.model_validate(BEFORE)
    assert (status.step, status.gate, status.difficulty) == (7, None, None)
    end = TerminationReport.model_validate({"exitCode": 0, "reason": "Succeeded", "final": BEFORE})
    assert end.final == status


def test_a_resource_from_before_the_gate_is_read_without_one() -> None:
    status = PylonJobStatus.model_validate({"attempt": 1, "ready": "2/2", "training": {"step": 7, "tokenRatio": 0.5}})
    assert status.training is not None
    assert (status.gate, status.training.step, status.training.gate) == ("", 7, None)


def test_what_a_newer_trainer_says_of_its_gate_is_passed_over() -> None:
    gate = {"decision": "Gated", "ratio": 0.25, "colour": "green"}
    assert TrainerStatus.model_validate(BEFORE | {"gate": gate}).gate == GateReport(
        decision=GateDecision.GATED, ratio=0.25
    )


@pytest.mark.parametrize(
    ("decision", "ratio", "summary"), [("Gated", 0.5, "0.50"), ("Gated", 0.0625, "0.06"), ("Plain", 1, "plain")]
)
def test_the_gate_in_a_column(decision: str, ratio: float, summary: str) -> None:
    assert GateReport(decision=GateDecision(decision), ratio=ratio).summary == summary
