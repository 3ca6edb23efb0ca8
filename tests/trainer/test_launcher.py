"""How pods end: errors, bad input, stops. Exit codes and messages are what the operator acts on."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gangs import run_pod, save_at_once, spawn_pod, start_gang, write_within

from pylon_api import names
from pylon_api.names import ExitCode
from pylon_api.run import TerminationReport
from pylon_trainer import launcher, worker
from pylon_trainer.checkpoint import disk
from pylon_trainer.run import Run

MakeConfig = Callable[..., dict[str, Any]]


def test_an_error_nobody_foresaw_is_traced_and_named(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = Run.advance

    def fail(*arguments: Any) -> Any:
        if os.environ["RANK"] == "1":
            raise KeyError("surprise")
        return advance(*arguments)

    monkeypatch.setattr(Run, "advance", fail)
    exit_code, pod = run_pod(tmp_path, make_config())
    assert exit_code == ExitCode.INTERNAL
    assert (pod.report.rank, pod.report.message) == (1, "KeyError: 'surprise'")
    assert "Traceback" in pod.log


def test_memory_that_runs_out_is_told_from_other_errors(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Run, "advance", fail)
    exit_code, pod = run_pod(tmp_path, make_config(processes=1))
    assert exit_code == ExitCode.OUT_OF_MEMORY
    assert "lower training.batch.microSequences" in pod.report.message


@pytest.mark.parametrize(
    ("change", "exit_code", "words"),
    [
        ({"batch": {"sequences": 3}}, 78, ["training.batch.sequences 3"]),
        ({"gpus": 1}, 78, ["gpusPerNode 1", "0 CUDA devices", "gpusPerNode 0"]),
        ({"data": {"train": ["/nowhere/*.txt"]}}, 65, ["training.data.train", "/nowhere/*.txt"]),
        ({"model": {"vocabSize": 20}}, 78, ["vocabSize", "20", "257"]),
        ({"checkpoint": {"uri": "s4://bucket"}}, 78, ["unknown scheme s4://"]),
        ({"checkpoint": {"uri": "/proc/nowhere"}}, 74, ["/proc/nowhere"]),
    ],
)
def test_bad_input_ends_with_one_line_and_no_trace(
    tmp_path: Path,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    exit_code: int,
    words: list[str],
) -> None:
    monkeypatch.setattr("pylon_trainer.checkpoint.retries.RETRY_DELAYS_SECONDS", ())
    ended, pod = run_pod(tmp_path, make_config(**change))
    assert ended == exit_code, pod.log
    assert all(word in pod.report.message for word in words), pod.report.message
    assert pod.report.exit_code == exit_code
    assert "Traceback" not in pod.log
    assert len(pod.log.splitlines()) == 1


def test_a_status_port_in_use_is_named(tmp_path: Path, make_config: MakeConfig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        exit_code, pod = run_pod(tmp_path, make_config(), {names.ENV_STATUS_PORT: str(port)})
    assert exit_code == ExitCode.BAD_CONFIG, pod.log
    assert f"port {port} of 127.0.0.1 is in use" in pod.report.message


def test_a_rendezvous_port_in_use_is_named(tmp_path: Path, make_config: MakeConfig) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        exit_code, pod = run_pod(tmp_path, make_config(processes=1), {"PET_MASTER_PORT": str(port)})
    assert exit_code == ExitCode.BAD_CONFIG, pod.log
    assert f"port {port} of the rendezvous is in use" in pod.report.message


def test_a_full_disk_ends_the_run_and_keeps_the_older_checkpoint(
    tmp_path: Path, make_config: MakeConfig, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_all = disk._write_all

    def full(descriptor: int, data: memoryview, offset: int) -> None:
        file = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if "/step-" in file and "step-000000000003" not in file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_all(descriptor, data, offset)

    save_at_once(monkeypatch)
    write_within(monkeypatch)
    monkeypatch.setattr(disk, "_write_all", full)
    exit_code, pod = run_pod(tmp_path, make_config())
    assert exit_code == ExitCode.STORAGE
    assert "no space left there" in pod.report.message
    assert "Traceback" not in pod.log
    assert [path.name[:17] for path in checkpoints.glob("step-*")] == ["step-000000000003"]
    assert pod.final.saves is not None
    assert (pod.final.saves.committed, pod.final.saves.failed_in_row) == (1, 2)


def test_the_exit_code_gets_through_when_not_even_a_report_can_be_written(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pylon_trainer.report.write", full)
    exit_code, pod = run_pod(tmp_path, make_config(processes=1, data={"train": ["/nowhere/*.txt"]}))
    assert (exit_code, pod.report.message) == (65, "rank 0 ended with BadData and said nothing")
    assert "BadData: training.data.train" in pod.log
    assert "Traceback" not in pod.log


@pytest.mark.parametrize(
    ("change", "field", "had"),
    [
        ({"model": {"hiddenSize": 32}}, "training.model.hiddenSize is 32", "16"),
        ({"optimizer": {"name": "Lion"}}, "training.optimizer.name is Lion", "AdamW"),
    ],
)
def test_a_checkpoint_of_another_model_or_optimizer_is_refused_by_the_first_field(
    tmp_path: Path, make_config: MakeConfig, change: dict[str, Any], field: str, had: str
) -> None:
    assert run_pod(tmp_path, make_config())[0] == 0
    exit_code, pod = run_pod(tmp_path, make_config(attempt=2, **change))
    assert exit_code == ExitCode.BAD_CONFIG
    assert f"{field}, but " in pod.report.message
    assert pod.report.message.endswith(f"was trained with {had}")


def test_a_damaged_checkpoint_is_passed_over_with_a_notice(
    tmp_path: Path, make_config: MakeConfig, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_at_once(monkeypatch)
    assert run_pod(tmp_path, make_config())[0] == 0
    newest = max(checkpoints.glob("step-*"))
    data = bytearray((newest / "rank-00001.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "rank-00001.safetensors").write_bytes(data)
    exit_code, pod = run_pod(tmp_path, make_config(attempt=2))
    assert exit_code == 0, pod.log
    assert pod.final.notices == [
        f"passed over {newest}: checksum of rank-00001.safetensors differs in part 0, bytes 0 to {len(data)}"
    ]
    assert pod.final.restored_from is not None
    assert "step-000000000006" in pod.final.restored_from


def test_another_runs_checkpoint_is_a_start(
    tmp_path: Path, make_config: MakeConfig, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_at_once(monkeypatch)
    assert run_pod(tmp_path, make_config())[0] == 0
    place = {"uri": str(tmp_path / "elsewhere"), "restoreFrom": {"uri": str(checkpoints), "step": 6}}
    exit_code, pod = run_pod(tmp_path / "other", make_config(checkpoint=place, batch={"sequences": 8}))
    assert exit_code == 0, pod.log
    assert (min(pod.values("loss")), pod.final.step) == (7, 8)
    assert ["the data differs" in notice for notice in pod.final.notices] == [True]
    place["restoreFrom"] = {"uri": str(checkpoints), "step": 5}
    exit_code, pod = run_pod(tmp_path / "third", make_config(checkpoint={**place, "uri": str(tmp_path / "third")}))
    assert exit_code == ExitCode.BAD_CONFIG
    assert f"restoreFrom: no committed checkpoint of step 5 in {checkpoints}" in pod.report.message


def test_a_pod_that_hangs_is_killed_within_its_grace(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers that do not answer a stop are killed while there is time to say so."""
    ready = tmp_path / "ready"

    def hang(*_: Any) -> None:
        ready.touch()
        threading.Event().wait()

    monkeypatch.setattr(Run, "advance", hang)
    (pod,) = start_gang(tmp_path, make_config(processes=1), {names.ENV_GRACE_SECONDS: "6"})
    while not ready.exists():
        time.sleep(0.02)
    os.kill(pod.pid, signal.SIGTERM)
    assert pod.wait() == 128 + signal.SIGKILL
    assert pod.report.message == "rank 0 ended with SIGKILL and said nothing"


@pytest.mark.parametrize("waits_for", ["name", "topology"])
def test_a_stop_while_the_pod_waits_is_obeyed_at_once(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, waits_for: str
) -> None:
    ready = tmp_path / "ready"
    config = make_config()
    if waits_for == "topology":
        config["topologyLevels"] = ["topology.kubernetes.io/zone"]

    def wait(condition: Callable[[], bool], seconds: float) -> bool:
        ready.touch()
        while not condition():
            time.sleep(0.02)
        return True

    monkeypatch.setattr(launcher, "_wait", wait)
    (pod,) = start_gang(tmp_path, config, {"PET_MASTER_ADDR": "pod-0.nowhere.invalid"})
    while not ready.exists():
        time.sleep(0.02)
    os.kill(pod.pid, signal.SIGTERM)
    assert pod.wait() == ExitCode.STOPPED
    assert pod.report.message == "asked to stop before training began"


def test_a_stop_that_workers_cannot_catch_yet_is_a_stop(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start() -> None:
        """As a worker that still imports torch."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getppid(), signal.SIGTERM)
        threading.Event().wait()

    monkeypatch.setattr(worker, "main", start)
    exit_code, pod = run_pod(tmp_path, make_config(processes=1))
    assert (exit_code, pod.report.message) == (ExitCode.STOPPED, "asked to stop before training began")


def test_a_master_that_never_resolves_is_a_lost_peer(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "NAME_WAIT_SECONDS", 0)
    exit_code, pod = run_pod(tmp_path, make_config(), {"PET_MASTER_ADDR": "pod-0.nowhere.invalid"})
    assert exit_code == ExitCode.PEER_LOST
    assert "pod-0.nowhere.invalid (pod 0 of the gang) did not resolve" in pod.report.message


def test_a_topology_that_never_comes_is_done_without(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "TOPOLOGY_WAIT_SECONDS", 0)
    config = make_config(processes=1) | {"topologyLevels": ["topology.kubernetes.io/zone"]}
    exit_code, pod = run_pod(tmp_path, config)
    assert exit_code == 0
    assert "every node counts alone" in pod.log


def test_by_command_line_a_bad_configuration_is_refused_in_a_moment(tmp_path: Path, make_config: MakeConfig) -> None:
    pod = spawn_pod(tmp_path / "pod", make_config(batch={"sequences": 3}))
    output, errors = pod.communicate(timeout=60)
    assert (pod.returncode, output) == (ExitCode.BAD_CONFIG, "")
    assert errors.startswith("pylon: BadConfig: training.batch.sequences 3")
    assert len(errors.splitlines()) == 1
    report = TerminationReport.model_validate_json((tmp_path / "pod" / "termination").read_bytes())
    assert errors.strip() == f"pylon: BadConfig: {report.message}"


@pytest.mark.slow
def test_by_command_line_a_pod_trains(tmp_path: Path, make_config: MakeConfig) -> None:
    pod = spawn_pod(tmp_path / "pod", make_config())
    output, errors = pod.communicate(timeout=240)
    assert (pod.returncode, errors) == (0, "")
    assert "step=8 loss=" in output
    report = TerminationReport.model_validate_json((tmp_path / "pod" / "termination").read_bytes())
    assert report.final is not None
    assert report.final.step == 8
