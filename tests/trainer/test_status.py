"""Rank 0's HTTP server: status, metrics, and who may ask for a checkpoint."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pylon_api.run import (
    CheckpointReport,
    DifficultyReport,
    GateDecision,
    GateReport,
    Histogram,
    SaveReport,
    TrainerPhase,
    TrainerStatus,
)
from pylon_trainer.errors import ConfigError
from pylon_trainer.status import Board, serve

GATE = GateReport(
    decision=GateDecision.GATED,
    reason="gradient mass 0.93 at ratio 0.5; a step costs 0.71 of a plain one",
    ratio=0.5,
    retained_mass=0.93,
    saved_flops_ratio=0.31,
    nonfinite_steps=2,
)
DIFFICULTY = DifficultyReport(
    gradient_norm=Histogram(bounds=[0.5, 1], counts=[7, 2, 1], sum=4.5),
    entropy=Histogram(bounds=[1, 12], counts=[10, 0, 0], sum=3),
)
TOKEN = {"Authorization": "Bearer secret"}


@pytest.fixture
def board() -> Board:
    status = TrainerStatus(uid="12345678", attempt=2, phase=TrainerPhase.TRAINING, step=4, total_steps=10, loss=2.5)
    board = Board(status)
    board.begin_step(5)
    return board


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("secret\n")
    return path


@pytest.fixture
def url(board: Board, token_file: Path) -> Iterator[str]:
    server = serve(board, "127.0.0.1", 0, token_file=token_file, saves_checkpoints=True)
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def call(url: str, method: str = "GET", headers: dict[str, str] | None = None) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method, headers=headers or {})) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as refusal:
        return refusal.code, refusal.read().decode()


def test_status_is_the_newest_one(url: str, board: Board) -> None:
    board.update(step=5, loss=float("nan"))
    code, text = call(f"{url}/status")
    assert code == 200
    assert json.loads(text)["totalSteps"] == 10
    read = TrainerStatus.model_validate_json(text)
    assert (read.uid, read.attempt, read.step, read.loss) == ("12345678", 2, 5, None)


def test_metrics_are_the_same_numbers_for_prometheus(url: str, board: Board) -> None:
    board.saved(CheckpointReport(step=4, uri="s3://bucket/4"))
    code, text = call(f"{url}/metrics")
    lines = text.splitlines()
    assert code == 200
    for line in (
        "pylon_trainer_step 4.0",
        "pylon_trainer_loss 2.5",
        "pylon_trainer_checkpoint_step 4.0",
        'pylon_trainer_phase{phase="Training"} 1.0',
        'pylon_trainer_phase{phase="Saving"} 0.0',
        "pylon_trainer_tokens_total 0.0",
    ):
        assert line in lines
    assert not any(line.startswith("pylon_trainer_held_out_loss ") for line in lines)


def test_saves_are_in_the_metrics(url: str, board: Board) -> None:
    time = datetime(2026, 3, 1, tzinfo=UTC)
    board.saved(CheckpointReport(step=4, uri="s3://bucket/4", size_bytes=5000, committed_time=time))
    board.update(
        saves=SaveReport(committed=7, failed=3, failed_in_row=2, put_off=1, stall_seconds=0.25, failure="full")
    )
    lines = call(f"{url}/metrics")[1].splitlines()
    for line in (
        "pylon_trainer_checkpoint_size_bytes 5000.0",
        "pylon_trainer_checkpoint_committed_timestamp_seconds 1.7723232e+09",
        "pylon_trainer_saves_committed_total 7.0",
        "pylon_trainer_saves_failed_total 3.0",
        "pylon_trainer_saves_failed_in_row 2.0",
        "pylon_trainer_saves_put_off_total 1.0",
        "pylon_trainer_saves_stall_seconds 0.25",
    ):
        assert line in lines
    assert not any(line.startswith("pylon_trainer_saves_write_seconds ") for line in lines), "nothing measured yet"


def test_the_gate_is_in_status_and_metrics(url: str, board: Board) -> None:
    board.update(gate=GATE, difficulty=DIFFICULTY)
    _, text = call(f"{url}/status")
    assert json.loads(text)["gate"] == {
        "decision": "Gated",
        "reason": "gradient mass 0.93 at ratio 0.5; a step costs 0.71 of a plain one",
        "ratio": 0.5,
        "retainedMass": 0.93,
        "savedFlopsRatio": 0.31,
        "nonfiniteSteps": 2,
    }
    read = TrainerStatus.model_validate_json(text)
    assert (read.gate, read.difficulty) == (GATE, DIFFICULTY)
    lines = call(f"{url}/metrics")[1].splitlines()
    for line in (
        "pylon_trainer_gate_ratio 0.5",
        "pylon_trainer_gate_retained_mass 0.93",
        "pylon_trainer_gate_saved_flops_ratio 0.31",
        "pylon_trainer_gate_nonfinite_steps_total 2.0",
        'pylon_trainer_gate_decision{decision="Gated"} 1.0',
        'pylon_trainer_gate_decision{decision="Plain"} 0.0',
        'pylon_trainer_token_gradient_norm_bucket{le="0.5"} 7.0',
        'pylon_trainer_token_gradient_norm_bucket{le="1.0"} 9.0',
        'pylon_trainer_token_gradient_norm_bucket{le="+Inf"} 10.0',
        "pylon_trainer_token_gradient_norm_count 10.0",
        "pylon_trainer_token_gradient_norm_sum 4.5",
        "pylon_trainer_token_entropy_nats_sum 3.0",
    ):
        assert line in lines
    assert not any(line.startswith("pylon_trainer_gate_effective_token_share ") for line in lines)


def test_without_a_gate_nothing_is_said_of_one(url: str) -> None:
    assert not {"gate", "difficulty"} & json.loads(call(f"{url}/status")[1]).keys()
    assert "pylon_trainer_gate" not in call(f"{url}/metrics")[1]


def test_a_checkpoint_is_promised_for_the_next_step(url: str, board: Board) -> None:
    assert call(f"{url}/checkpoint", "POST", TOKEN) == (202, '{"step": 6}')
    assert board.status.checkpoint_requested_step == 6
    assert not board.begin_step(5)
    assert board.begin_step(6)
    board.saved(CheckpointReport(step=6, uri="s3://bucket/6"))
    assert board.status.checkpoint_requested_step is None


def test_a_second_request_keeps_the_first_promise(url: str, board: Board) -> None:
    call(f"{url}/checkpoint", "POST", TOKEN)
    board.update(step=5)
    assert call(f"{url}/checkpoint", "POST", TOKEN) == (202, '{"step": 6}')


def test_a_request_in_the_last_step_is_answered_by_the_last_checkpoint(url: str, board: Board) -> None:
    board.begin_step(10)
    assert call(f"{url}/checkpoint", "POST", TOKEN) == (202, '{"step": 10}')
    board.saved(CheckpointReport(step=10, uri="s3://bucket/10"))
    assert call(f"{url}/checkpoint", "POST", TOKEN) == (202, '{"step": 10}')
    assert board.status.checkpoint_requested_step is None


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}])
def test_without_the_token_nothing_is_promised(url: str, board: Board, headers: dict[str, str]) -> None:
    code, text = call(f"{url}/checkpoint", "POST", headers)
    assert (code, list(json.loads(text))) == (401, ["error"])
    assert board.status.checkpoint_requested_step is None


@pytest.mark.parametrize("content", [None, "", "renewed"])
def test_the_token_is_read_anew_for_each_request(url: str, token_file: Path, content: str | None) -> None:
    if content is None:
        token_file.unlink()
    else:
        token_file.write_text(content)
    assert call(f"{url}/checkpoint", "POST", TOKEN)[0] == 401
    assert call(f"{url}/checkpoint", "POST", {"Authorization": "Bearer renewed"})[0] == (
        202 if content == "renewed" else 401
    )
    assert call(f"{url}/checkpoint", "POST", {"Authorization": "Bearer "})[0] == 401


def test_before_training_there_is_nothing_to_save(url: str, board: Board) -> None:
    board.update(phase=TrainerPhase.RESTORING)
    assert call(f"{url}/checkpoint", "POST", TOKEN)[0] == 503


def test_a_run_without_checkpoints_says_so(board: Board, token_file: Path) -> None:
    server = serve(board, "127.0.0.1", 0, token_file=token_file, saves_checkpoints=False)
    code, text = call(f"http://127.0.0.1:{server.server_address[1]}/checkpoint", "POST", TOKEN)
    server.shutdown()
    server.server_close()
    assert code == 503
    assert "training.checkpoint is not set" in text


@pytest.mark.parametrize(("path", "method"), [("/", "GET"), ("/statuses", "GET"), ("/status", "POST")])
def test_unknown_paths_are_refused(url: str, path: str, method: str) -> None:
    assert call(url + path, method)[0] == 404


def test_a_port_in_use_is_named(url: str, board: Board) -> None:
    port = int(url.rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 is in use.*PYLON_STATUS_PORT"):
        serve(board, "127.0.0.1", port, token_file=None, saves_checkpoints=False)


def test_notices_keep_the_newest(board: Board) -> None:
    for number in range(25):
        board.add_notice(f"notice {number}")
    assert board.status.notices == [f"notice {number}" for number in range(5, 25)]
