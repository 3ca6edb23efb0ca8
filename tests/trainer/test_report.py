"""Which end explains a pod, and that the message always fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pylon_api.names import ExitCode
from pylon_api.run import (
    CheckpointReport,
    DifficultyReport,
    GateDecision,
    GateReport,
    Histogram,
    SaveReport,
    TerminationReport,
    TrainerStatus,
)
from pylon_trainer import report
from pylon_trainer.report import WorkerEnd, cause, describe, fit, reason

COUNTS = Histogram(bounds=[number / 10 for number in range(32)], counts=[10**15] * 33, sum=1e15)
DIFFICULTY = DifficultyReport(gradient_norm=COUNTS, entropy=COUNTS)


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([(1.0, 78)], 78),
        ([(2.0, 74), (1.0, 70)], 70),
        ([(1.0, 76), (2.0, 137)], 137),
        ([(1.0, 75), (2.0, 76), (3.0, 65)], 65),
        ([(1.0, 143), (1.5, 78)], 78),
        ([(2.0, 76), (1.0, 75)], 75),
    ],
)
def test_the_first_failure_explains_and_consequences_come_last(ends: list[tuple[float, int]], expected: int) -> None:
    assert cause(WorkerEnd(time, describe(code, "")) for time, code in ends).exit_code == expected


@pytest.mark.parametrize(
    ("exit_code", "name"),
    [(0, "Succeeded"), (78, "BadConfig"), (76, "PeerLost"), (137, "SIGKILL"), (139, "SIGSEGV"), (3, "Exit3")],
)
def test_reasons_are_camel_case_names(exit_code: int, name: str) -> None:
    assert reason(exit_code) == name


def test_a_message_is_one_line_of_bounded_length() -> None:
    message = describe(ExitCode.INTERNAL, "first\n  second\t" + "x" * 5000).message
    assert message.startswith("first second xxx")
    assert len(message) <= 1000


@pytest.mark.parametrize("filling", ["x", "ж", "🜚", '"'])
def test_any_report_fits_and_keeps_what_matters(filling: str) -> None:
    status = TrainerStatus(
        uid="u" * 36,
        attempt=3,
        step=7,
        loss=float("nan"),
        sample=filling * 9000,
        notices=[filling * 3000] * 20,
        gate=GateReport(decision=GateDecision.GATED, reason=filling * 3000, ratio=0.5),
        difficulty=DIFFICULTY,
        checkpoint=CheckpointReport(step=7, uri="s3://bucket/" + filling * 300),
    )
    text = fit(describe(ExitCode.STORAGE, filling * 9000, rank=0).model_copy(update={"final": status}))
    assert len(text) < 4096
    read = TerminationReport.model_validate_json(text)
    assert (read.exit_code, read.reason, read.rank) == (74, "Storage", 0)
    assert read.message.startswith(filling * 100)


def test_histograms_go_before_anything_that_people_read() -> None:
    status = TrainerStatus(uid="u", attempt=1, step=7, sample="x" * 3000, difficulty=DIFFICULTY)
    status = status.model_copy(update={"gate": GateReport(decision=GateDecision.PLAIN, reason="early", ratio=1)})
    text = fit(describe(0, "").model_copy(update={"final": status}))
    assert TerminationReport.model_validate_json(text).final == status.model_copy(update={"difficulty": None})


def test_a_stores_long_words_do_not_cost_the_checkpoint() -> None:
    checkpoint = CheckpointReport(step=7, uri="s3://bucket/step-7")
    saves = SaveReport(failed_in_row=1, failure="x" * 9000)
    status = TrainerStatus(uid="u", attempt=1, step=9, checkpoint=checkpoint, saves=saves)
    final = TerminationReport.model_validate_json(fit(describe(74, "").model_copy(update={"final": status}))).final
    assert final is not None
    assert final.saves is not None
    assert (final.checkpoint, final.saves.failure) == (checkpoint, "x" * 200)


def test_a_small_report_keeps_its_whole_status() -> None:
    status = TrainerStatus(uid="u", attempt=1, step=7, sample="hello", notices=["a notice"])
    end = describe(0, "").model_copy(update={"final": status})
    assert TerminationReport.model_validate_json(fit(end)) == end


def test_what_was_not_written_or_is_no_report_reads_as_nothing(tmp_path: Path) -> None:
    assert report.read(tmp_path / "absent.json") is None
    (tmp_path / "half.json").write_text(json.dumps({"exitCode": 1})[:5])
    assert report.read(tmp_path / "half.json") is None
    report.write(describe(78, "no"), tmp_path / "whole.json")
    whole = report.read(tmp_path / "whole.json")
    assert whole is not None
    assert whole.report.message == "no"
