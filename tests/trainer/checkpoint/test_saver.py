"""Whole runs that save beside training: what is killed, refused or slow loses nothing that was committed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from gangs import Pod, run_gang, run_pod, run_spawned_pod, save_at_once, spawn_pod, start_gang, write_within

from pylon_api.names import ExitCode
from pylon_trainer.checkpoint.archive import Archive
from pylon_trainer.checkpoint.disk import DiskUpload
from pylon_trainer.checkpoint.manifest import Manifest
from pylon_trainer.checkpoint.restore import _Reader
from pylon_trainer.checkpoint.saver import Saver
from pylon_trainer.checkpoint.storage import Storage
from pylon_trainer.checkpoint.writer_process import WriterProcess
from pylon_trainer.errors import ConfigError, StorageError
from pylon_trainer.gating import gate, measurement
from pylon_trainer.run import Run
from pylon_trainer.runtime.distributed import World
from pylon_trainer.runtime.seeds import reseed
from pylon_trainer.status import Board

if TYPE_CHECKING:
    from s3_faults import FaultyStore

MakeConfig = Callable[..., dict[str, Any]]
GATING = {"strategy": "GradientNorm", "fallback": "Never", "engine": "SinglePass", "targetMass": 0.6}


def before_steps(monkeypatch: pytest.MonkeyPatch, act: Callable[[Run], object]) -> None:
    """Have every rank do something just before its part of each step."""
    advance = Run.advance

    def patched(run: Run, *arguments: Any) -> Any:
        act(run)
        return advance(run, *arguments)

    monkeypatch.setattr(Run, "advance", patched)


def committed(checkpoints: Path) -> list[int]:
    return sorted(int(marker.parent.name.split("-")[1]) for marker in checkpoints.glob("step-*/COMMITTED"))


def newest(checkpoints: Path) -> Path:
    """The newest committed checkpoint: the last attempt's last."""
    return max(checkpoints.glob("step-*/COMMITTED"), key=lambda path: path.parent.name.split("-")[3::-2]).parent


def files(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.glob("rank-*.safetensors")}


def positions(checkpoint: Path) -> dict[str, list[int]]:
    """Where each lane of the data is."""
    own = json.loads((checkpoint / "manifest.json").read_bytes())["own"]
    return {lane: position for rank in own for lane, position in rank["data"]["lanes"].items()}


def losses(*pods: Pod) -> dict[int, float]:
    return {step: float(loss) for pod in pods for step, loss in pod.values("loss").items()}


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_while_saves_are_under_way_goes_on_bit_for_bit(
    tmp_path: Path, make_config: MakeConfig, checkpoints: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    def die_after_a_commit(run: Run) -> None:
        """Steps wait a little for it: on a busy machine all might end before the writer has begun."""
        deadline = time.monotonic() + 0.2
        while run.step > 6 and time.monotonic() < deadline:
            if list(checkpoints.glob("step-*/COMMITTED")):
                die()
            time.sleep(0.005)

    for module in (gate, measurement):
        monkeypatch.setattr(module, "INTERVAL_STEPS", 2)  # so that the ratio moves within the run
    recipe = {"processes": processes, "gating": GATING, "schedule": {"steps": 60}, "checkpoint": {"intervalSteps": 1}}
    exit_code, whole = run_pod(tmp_path / "whole", make_config(**recipe))
    assert exit_code == 0, whole.log
    expected = files(newest(checkpoints))
    checkpoints.rename(tmp_path / "kept")

    with monkeypatch.context() as patch:
        # The next save is under way by then, for every step makes one due.
        before_steps(patch, die_after_a_commit)
        exit_code, first = run_pod(tmp_path / "parts", make_config(**recipe))
    assert exit_code == 128 + signal.SIGKILL, first.log
    restarts = committed(checkpoints)[-1]
    exit_code, second = run_pod(tmp_path / "parts", make_config(attempt=2, **recipe))
    assert exit_code == 0, second.log
    assert min(second.values("loss")) == restarts + 1
    assert first.values("loss") | second.values("loss") == whole.values("loss")
    assert files(newest(checkpoints)) == expected
    assert len(set(whole.values("token_ratio").values())) > 1, "the ratio has moved"
    assert all(path.joinpath("COMMITTED").exists() for path in checkpoints.glob("step-*")), "leftovers are cleaned up"


@pytest.mark.parametrize("reads_its_own", [True, False])
def test_what_a_rank_has_for_itself_goes_to_no_other_rank(
    tmp_path: Path, make_config: MakeConfig, checkpoints: Path, monkeypatch: pytest.MonkeyPatch, reads_its_own: bool
) -> None:
    recipe = {"schedule": {"steps": 8}, "checkpoint": {"intervalSteps": 4}}
    save_at_once(monkeypatch)
    with monkeypatch.context() as patch:
        before_steps(patch, lambda run: run.step == 5 and die())
        run_pod(tmp_path, make_config(**recipe))
    share_out, broadcast_tensor = _Reader._share_out, World.broadcast_tensor

    def swapped(reader: _Reader, manifest: Manifest) -> dict[str, Any]:
        return {file: copy._replace(rank=1 - copy.rank) for file, copy in share_out(reader, manifest).items()}

    def guarded(world: World, tensor: torch.Tensor, source: int) -> None:
        assert tensor.dtype != torch.uint8, "a generator's state"
        broadcast_tensor(world, tensor, source)

    monkeypatch.setattr(World, "broadcast_tensor", guarded)
    if not reads_its_own:
        monkeypatch.setattr(_Reader, "_share_out", swapped)
    exit_code, pod = run_pod(tmp_path, make_config(attempt=2, **recipe))
    assert exit_code == 0, pod.log
    assert min(losses(pod)) == 5


def test_a_run_goes_on_with_three_ranks_and_then_with_one(
    tmp_path: Path, make_config: MakeConfig, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {"batch": {"sequences": 6}, "schedule": {"steps": 12}}
    exit_code, whole = run_pod(tmp_path / "whole", make_config(**recipe))
    assert exit_code == 0, whole.log
    expected = positions(newest(checkpoints))
    checkpoints.rename(tmp_path / "kept")

    save_at_once(monkeypatch)
    pods = []
    for attempt, (processes, last_step) in enumerate(((2, 4), (3, 8), (1, 12)), start=1):
        with monkeypatch.context() as patch:
            before_steps(patch, lambda run, last=last_step: run.step == last and run.world.rank == 0 and die())
            config = make_config(attempt=attempt, processes=processes, checkpoint={"intervalSteps": 4}, **recipe)
            exit_code, pod = run_pod(tmp_path / "parts", config)
        assert exit_code == (0 if last_step == 12 else 128 + signal.SIGKILL), pod.log
        pods.append(pod)
    assert min(losses(pods[1])) == 5
    assert min(losses(pods[2])) == 9
    assert losses(*pods) == pytest.approx(losses(whole), abs=2e-5)
    assert positions(newest(checkpoints)) == expected
    assert "is of 3 ranks, this run of 1: generators begin anew" in pods[2].log


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "gpus",
    [
        pytest.param(0, marks=pytest.mark.slow, id="cpu"),
        pytest.param(1, marks=pytest.mark.gpu, id="gpu"),
    ],
)
def test_a_run_goes_on_bit_for_bit_where_it_began_and_on_a_cpu_nearly_so(
    tmp_path: Path, make_config: MakeConfig, checkpoints: Path, gpus: int
) -> None:
    """Pods are spawned, for the tests before this one may have used the device."""
    recipe = {
        "processes": 1,
        "gating": GATING,
        "schedule": {"steps": 12},
        "checkpoint": {"intervalSteps": 4, "keep": 9},
    }
    exit_code, whole = run_spawned_pod(tmp_path / "whole", make_config(gpus=gpus, **recipe))
    assert exit_code == 0, whole.log
    expected = files(newest(checkpoints))
    for marker in checkpoints.glob("step-*-attempt-000001-*/COMMITTED"):
        if "step-000000000004" not in str(marker):
            marker.unlink()
    for attempt, here in ((2, gpus), (3, 0)):
        place = tmp_path / f"attempt-{attempt}"
        exit_code, pod = run_spawned_pod(place, make_config(attempt=attempt, gpus=here, **recipe))
        assert exit_code == 0, pod.log
        assert min(losses(pod)) == 5, pod.log
        assert losses(pod) == pytest.approx({step: loss for step, loss in losses(whole).items() if step > 4}, abs=0.02)
        if here == gpus:
            assert files(newest(checkpoints)) == expected
        for marker in checkpoints.glob(f"step-*-attempt-{attempt:06d}-*/COMMITTED"):
            marker.unlink()


def test_a_stop_while_a_save_is_written_waits_for_the_newest_state(
    tmp_path: Path, make_config: MakeConfig, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_within(monkeypatch)
    put, is_stopping = DiskUpload.put, threading.Event()

    def slow(upload: DiskUpload, offset: int, data: memoryview) -> None:
        assert is_stopping.wait(60)
        put(upload, offset, data)

    def stop(run: Run) -> None:
        if run.step == 5:
            os.kill(os.getppid(), signal.SIGTERM)
            is_stopping.set()

    monkeypatch.setattr(DiskUpload, "put", slow)
    before_steps(monkeypatch, stop)
    exit_code, pod = run_pod(tmp_path, make_config(processes=1, schedule={"steps": 100_000}))
    assert exit_code == ExitCode.STOPPED, pod.log
    assert pod.final.checkpoint is not None
    assert pod.final.step == pod.final.checkpoint.step == committed(checkpoints)[-1]
    assert pod.report.message.endswith(f"saved in {pod.final.checkpoint.uri}")


def test_a_stop_is_obeyed_though_the_store_takes_nothing(
    tmp_path: Path, make_config: MakeConfig, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_within(monkeypatch)
    monkeypatch.setattr("pylon_trainer.checkpoint.saver.EXIT_MARGIN_SECONDS", 28)
    monkeypatch.setattr(DiskUpload, "put", lambda *_: threading.Event().wait())
    before_steps(
        monkeypatch, lambda run: run.step == 5 and run.world.rank == 1 and os.kill(os.getppid(), signal.SIGTERM)
    )
    exit_code, pod = run_pod(tmp_path, make_config(schedule={"steps": 100_000}))
    assert exit_code == ExitCode.STOPPED, pod.log
    assert "not saved: its checkpoint was not written within 2 s; raise checkpointTimeoutSeconds" in pod.report.message
    assert committed(checkpoints) == []


def test_a_stop_of_one_pod_is_obeyed_by_all_though_the_store_takes_nothing(
    tmp_path: Path, make_config: MakeConfig, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both slabs of the pod that hears nothing are taken: it must not wait for one without end."""
    write_within(monkeypatch)
    monkeypatch.setattr("pylon_trainer.checkpoint.saver.EXIT_MARGIN_SECONDS", 28)
    monkeypatch.setattr(DiskUpload, "put", lambda *_: threading.Event().wait())
    before_steps(
        monkeypatch, lambda run: run.step == 8 and run.world.rank == 0 and os.kill(os.getppid(), signal.SIGTERM)
    )
    recipe = {"schedule": {"steps": 100_000}, "checkpoint": {"intervalSteps": 2}}
    first, second = start_gang(tmp_path, make_config(nodes=2, processes=1, **recipe))
    assert (first.wait(), second.wait()) == (ExitCode.STOPPED, ExitCode.STOPPED), first.log
    assert committed(checkpoints) == []


def test_when_a_rank_dies_in_the_middle_of_a_file_nothing_of_it_is_offered(
    tmp_path: Path, make_config: MakeConfig, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = DiskUpload.put

    def torn(upload: DiskUpload, offset: int, data: memoryview) -> None:
        if "step-000000000006" in upload._uri and "rank-00001" in upload._uri:
            put(upload, offset, data[: len(data) // 2])
            die()
        put(upload, offset, data)

    save_at_once(monkeypatch)
    with monkeypatch.context() as patch:
        write_within(patch)
        patch.setattr(DiskUpload, "put", torn)
        exit_code, pod = run_pod(tmp_path, make_config())
    assert exit_code == 128 + signal.SIGKILL, pod.log
    assert len(list(checkpoints.glob("step-*/rank-00001.safetensors"))) == 2, "a torn file lies there"
    exit_code, pod = run_pod(tmp_path, make_config(attempt=2))
    assert exit_code == 0, pod.log
    assert min(pod.values("loss")) == 4
    assert committed(checkpoints) == [6, 8]
    assert len(list(checkpoints.glob("step-*"))) == 2, "and is cleaned up"


def test_when_a_writer_dies_its_save_is_given_up_and_the_next_one_commits(
    tmp_path: Path, make_config: MakeConfig, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers: list[WriterProcess] = []
    begin, handle = Saver._begin, WriterProcess.handle

    def remember(writer: WriterProcess, order: Any) -> None:
        writers[:] = [writer]
        handle(writer, order)

    def kill_writer(saver: Saver, *arguments: Any) -> None:
        begin(saver, *arguments)
        if saver._run.step == 6 and saver._run.world.rank == 1:
            wait_until(lambda: writers[0].pid is not None)
            os.kill(writers[0].pid or 0, signal.SIGKILL)

    save_at_once(monkeypatch)
    monkeypatch.setattr(WriterProcess, "handle", remember)
    monkeypatch.setattr(Saver, "_begin", kill_writer)
    exit_code, pod = run_pod(tmp_path, make_config())
    assert exit_code == 0, pod.log
    assert committed(checkpoints) == [3, 8]
    assert pod.final.saves is not None
    assert (pod.final.saves.committed, pod.final.saves.failed, pod.final.saves.failed_in_row) == (2, 1, 0)
    assert "step=6 checkpoint given up: the writer process ended by signal 9" in pod.log


def test_a_rank_leaves_the_text_of_manifests_to_its_writer(
    tmp_path: Path, make_config: MakeConfig, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For thousands of tensors it takes longer than many a step; the writer's process knows nothing of this patch."""
    monkeypatch.setattr(Manifest, "dump", lambda _: die())
    local = {"local": {"directory": str(tmp_path / "ssd")}}
    exit_code, pod = run_pod(tmp_path, make_config(checkpoint={"intervalSteps": 100, **local}))
    assert exit_code == 0, pod.log
    assert (committed(checkpoints), committed(on_disk(tmp_path))) == ([8], [8])


def test_while_a_store_is_out_of_reach_training_goes_on(
    tmp_path: Path, make_config: MakeConfig, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = Storage.upload

    def unreachable(storage: Storage, path: str, *arguments: Any, **named: Any) -> Any:
        if any(f"step-{step:012d}" in path for step in (4, 6)):
            raise StorageError(f"cannot write {storage.uri}/{path}: connection refused")
        return upload(storage, path, *arguments, **named)

    save_at_once(monkeypatch)
    write_within(monkeypatch)
    monkeypatch.setattr(Storage, "upload", unreachable)
    exit_code, pod = run_pod(tmp_path, make_config(checkpoint={"intervalSteps": 2, "keep": 9}))
    assert exit_code == 0, pod.log
    assert committed(checkpoints) == [2, 8]
    assert pod.final.saves is not None
    assert (pod.final.saves.failed, pod.final.saves.failed_in_row, pod.final.saves.failure) == (2, 0, "")
    assert pod.log.count("checkpoint given up: cannot write") == 2
    assert len(losses(pod)) == 8


@pytest.mark.parametrize("keeps_on_disks", [False, True])
def test_credentials_that_have_expired_at_the_last_save_are_no_fault_of_the_configuration(
    tmp_path: Path, make_config: MakeConfig, checkpoints: Path, monkeypatch: pytest.MonkeyPatch, keeps_on_disks: bool
) -> None:
    upload = Storage.upload

    def expired(storage: Storage, path: str, *arguments: Any, **named: Any) -> Any:
        if storage.uri == str(checkpoints) and "step-000000000008" in path:
            raise ConfigError(f"cannot write {storage.uri}/{path}: credentials missing or refused (ExpiredToken)")
        return upload(storage, path, *arguments, **named)

    save_at_once(monkeypatch)
    write_within(monkeypatch)
    monkeypatch.setattr(Storage, "upload", expired)
    local = {"local": {"directory": str(tmp_path / "ssd")}} if keeps_on_disks else {}
    exit_code, pod = run_pod(tmp_path, make_config(processes=1, checkpoint={"intervalSteps": 4, **local}))
    assert exit_code == ExitCode.STORAGE, pod.log
    assert "credentials missing or refused (ExpiredToken); the newest kept is of step " in pod.report.message
    kept = newest(on_disk(tmp_path) if keeps_on_disks else checkpoints)
    assert pod.report.message.endswith(f" of step {8 if keeps_on_disks else 4}, in {kept}")


@pytest.mark.parametrize(("refusals", "steps"), [(3, [7, 30]), (99, [30])])
def test_what_was_asked_for_and_given_up_is_tried_again_a_few_times(
    tmp_path: Path,
    make_config: MakeConfig,
    checkpoints: Path,
    monkeypatch: pytest.MonkeyPatch,
    refusals: int,
    steps: list[int],
) -> None:
    upload, begin_step = Storage.upload, Board.begin_step
    refused: set[str] = set()

    def unreachable(storage: Storage, path: str, *arguments: Any, **named: Any) -> Any:
        if path in refused or ("step-000000000030" not in path and len(refused) < refusals):
            refused.add(path)
            raise StorageError(f"cannot write {storage.uri}/{path}: connection refused")
        return upload(storage, path, *arguments, **named)

    def ask(board: Board, step: int) -> bool:
        is_asked = begin_step(board, step)
        if step == 3:
            board.request_checkpoint()
        return is_asked

    save_at_once(monkeypatch)
    write_within(monkeypatch)
    monkeypatch.setattr("pylon_trainer.checkpoint.policy.REQUEST_PAUSES_SECONDS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(Storage, "upload", unreachable)
    monkeypatch.setattr(Board, "begin_step", ask)
    recipe = {"schedule": {"steps": 30}, "checkpoint": {"intervalSteps": 100}}
    exit_code, pod = run_pod(tmp_path, make_config(processes=1, **recipe))
    assert exit_code == 0, pod.log
    assert committed(checkpoints) == steps
    assert pod.log.count("checkpoint given up: cannot write") == min(refusals, 4)


def test_while_a_store_is_slow_one_save_waits_and_holds_the_newest_step(
    tmp_path: Path, make_config: MakeConfig, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two copies of the state are on their way when the third falls due, at step 3; the store wakes up at step 40."""
    write_within(monkeypatch)
    put, is_awake = DiskUpload.put, threading.Event()

    def slow(upload: DiskUpload, offset: int, data: memoryview) -> None:
        assert is_awake.wait(60)
        put(upload, offset, data)

    begun: list[int] = []
    begin = Saver._begin

    def record(saver: Saver, *arguments: Any) -> None:
        begun.append(saver._run.step)
        (tmp_path / "begun").write_text(json.dumps(begun))
        begin(saver, *arguments)

    monkeypatch.setattr(DiskUpload, "put", slow)
    monkeypatch.setattr(Saver, "_begin", record)
    before_steps(monkeypatch, lambda run: run.step == 40 and is_awake.set())
    recipe = {"schedule": {"steps": 41}, "checkpoint": {"intervalSteps": 1, "keep": 9}}
    exit_code, pod = run_pod(tmp_path, make_config(processes=1, **recipe))
    assert exit_code == 0, pod.log
    assert json.loads((tmp_path / "begun").read_text()) == [1, 2, 41]
    assert committed(checkpoints) == [1, 2, 41]
    assert pod.final.saves is not None
    assert pod.final.saves.put_off == 1


def test_an_attempt_that_a_newer_one_has_replaced_leaves_without_a_commit(
    tmp_path: Path, make_config: MakeConfig, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_at_once(monkeypatch)
    before_steps(monkeypatch, lambda run: run.step == 4 and Archive(Storage(str(checkpoints)), 2, 2).claim())
    exit_code, pod = run_pod(tmp_path, make_config())
    assert exit_code == ExitCode.PEER_LOST, pod.log
    assert pod.report.message == "attempt 2 has begun, so attempt 1 commits nothing more"
    assert committed(checkpoints) == [3]


def test_generators_of_another_number_of_ranks_are_seeded_alike_every_time() -> None:
    def draw(seed: int, rank: int, step: int) -> list[float]:
        reseed(seed, rank, step)
        return [float(number) for number in torch.rand(3)]

    numbers = [draw(*place) for place in ((0, 0, 5), (0, 1, 5), (0, 0, 6), (1, 0, 5))]
    assert len({tuple(drawn) for drawn in numbers}) == 4
    assert draw(0, 1, 5) == numbers[1]


@pytest.mark.slow
def test_a_run_saves_to_s3_and_goes_on_from_there(tmp_path: Path, make_config: MakeConfig, s3: FaultyStore) -> None:
    from s3_faults import Refuse

    place = {"uri": "s3://bucket/runs", "intervalSteps": 4}
    s3.faults.append(Refuse(method="PUT", times=2, status=503, code="SlowDown"))
    for attempt, steps in ((1, 5), (2, 8)):
        config = make_config(attempt=attempt, checkpoint=place, schedule={"steps": steps})
        pod = spawn_pod(tmp_path / f"{attempt}", config)
        output, errors = pod.communicate(timeout=240)
        assert (pod.returncode, errors) == (0, ""), output
    assert "step=5 restored=s3://bucket/runs/default/demo-12345678/step-000000000005-attempt-000001-" in output
    assert "step=6 loss=" in output
    assert "step=8 checkpoint=s3://bucket/runs" in output


@pytest.mark.slow
def test_five_hundred_checkpoints_leave_nothing_behind(
    tmp_path: Path, make_config: MakeConfig, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory, threads and files of the rank and of its writer, at 100 and at 500."""

    def used(pid: str) -> tuple[int, int, int]:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        fields = {line.split()[0]: line.split()[1] for line in lines if len(line.split()) > 1}
        return int(fields["VmRSS:"]), int(fields["Threads:"]), len(list(Path(f"/proc/{pid}/fd").iterdir()))

    def measure(run: Run) -> None:
        if run.step in (100, 499):
            children = [
                child for task in Path("/proc/self/task").iterdir() for child in (task / "children").read_text().split()
            ]
            assert len(children) == 1
            (tmp_path / f"{run.step}").write_text(json.dumps([used("self"), used(children[0])]))

    save_at_once(monkeypatch)
    before_steps(monkeypatch, measure)
    recipe = {"schedule": {"steps": 500}, "checkpoint": {"intervalSteps": 1}, "logIntervalSteps": 100}
    exit_code, pod = run_pod(tmp_path, make_config(processes=1, evaluation={"intervalSteps": 0}, **recipe))
    assert exit_code == 0, pod.log
    assert committed(checkpoints) == [499, 500]
    early, late = (json.loads((tmp_path / str(step)).read_text()) for step in (100, 499))
    for (rss_kib, threads, descriptors), (late_rss_kib, late_threads, late_descriptors) in zip(
        early, late, strict=True
    ):
        assert late_rss_kib - rss_kib < 8192
        assert late_threads <= threads + 1
        assert late_descriptors <= descriptors


def local_config(make_config: MakeConfig, tmp_path: Path, attempt: int = 1, **local: Any) -> dict[str, Any]:
    """Two nodes of one rank each; both disks are one directory, as where pods run on one machine."""
    checkpoint = {"intervalSteps": 4, "keep": 2, "local": {"directory": str(tmp_path / "ssd"), **local}}
    return make_config(attempt=attempt, nodes=2, processes=1, checkpoint=checkpoint)


def on_disk(tmp_path: Path) -> Path:
    return tmp_path / "ssd" / "default" / "demo-12345678"


def test_nodes_keep_the_newest_and_a_restart_reads_there_first(
    tmp_path: Path, make_config: MakeConfig, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_at_once(monkeypatch)
    with monkeypatch.context() as patch:
        before_steps(patch, lambda run: run.step == 7 and die())
        run_gang(tmp_path, local_config(make_config, tmp_path, intervalSteps=2))
    assert committed(on_disk(tmp_path)) == [6], "one is kept"
    assert committed(checkpoints) == [4]
    first, second = start_gang(tmp_path, local_config(make_config, tmp_path, attempt=2, intervalSteps=2))
    assert (first.wait(), second.wait()) == (0, 0), first.log
    assert min(first.values("loss")) == 7, "newer than the store's"
    assert first.final.restored_from == f"{on_disk(tmp_path)}/{first.final.restored_from.rpartition('/')[2]}"
    assert committed(checkpoints) == [4, 8]


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_what_a_disk_has_lost_is_read_from_the_store(
    tmp_path: Path, make_config: MakeConfig, checkpoints: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    save_at_once(monkeypatch)
    with monkeypatch.context() as patch:
        before_steps(patch, lambda run: run.step == 5 and die())
        run_gang(tmp_path, local_config(make_config, tmp_path))
    (file,) = on_disk(tmp_path).glob("step-*4-*/rank-00001.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(data if damage == "flipped" else data[:-1])
    first, second = start_gang(tmp_path, local_config(make_config, tmp_path, attempt=2))
    assert (first.wait(), second.wait()) == (0, 0), first.log
    assert min(first.values("loss")) == 5
    assert first.final.restored_from is not None
    assert first.final.restored_from.startswith(str(checkpoints))
    told = [notice for notice in first.final.notices if notice.startswith("read from the store instead of ")]
    assert len(told) == (1 if damage == "flipped" else 0)


@pytest.mark.parametrize(
    ("death", "lost", "first_step"),
    [
        pytest.param(7, 6, 5, id="goes on from the one in the store"),
        pytest.param(3, 2, 1, id="begins anew while the store has none"),
    ],
)
def test_what_one_disk_has_lost_of_a_checkpoint_that_no_store_has_costs_that_checkpoint(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, death: int, lost: int, first_step: int
) -> None:
    save_at_once(monkeypatch)
    with monkeypatch.context() as patch:
        before_steps(patch, lambda run: run.step == death and die())
        run_gang(tmp_path, local_config(make_config, tmp_path, intervalSteps=2))
    (file,) = on_disk(tmp_path).glob(f"step-*{lost}-*/rank-00001.safetensors")
    file.unlink()
    first, second = start_gang(tmp_path, local_config(make_config, tmp_path, attempt=2))
    assert (first.wait(), second.wait()) == (0, 0), first.log
    assert min(first.values("loss")) == first_step
    assert [notice for notice in first.final.notices if "no node holds rank-00001.safetensors" in notice]


def test_what_one_node_could_not_commit_stays_where_another_did(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That one has removed what was older."""
    commit = Archive.commit

    def refuse(archive: Archive, name: str, *arguments: Any) -> Any:
        if os.environ["RANK"] == "1" and "step-000000000002" in name:
            wait_until(lambda: committed(on_disk(tmp_path)) == [2])
            raise StorageError(f"cannot write {name}: no space left there")
        return commit(archive, name, *arguments)

    save_at_once(monkeypatch)
    write_within(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(Archive, "commit", refuse)
        before_steps(patch, lambda run: run.step == 2 and die())
        run_gang(tmp_path, local_config(make_config, tmp_path, intervalSteps=1))
    first, second = start_gang(tmp_path, local_config(make_config, tmp_path, attempt=2, intervalSteps=1))
    assert (first.wait(), second.wait()) == (0, 0), first.log
    assert min(first.values("loss")) == 3


def test_a_disk_that_refuses_costs_no_checkpoint_in_the_store(
    tmp_path: Path, make_config: MakeConfig, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_at_once(monkeypatch)
    write_within(monkeypatch)
    upload = Storage.upload

    def refuses(storage: Storage, *arguments: Any, **named: Any) -> Any:
        if storage.uri.startswith(str(tmp_path / "ssd")):
            raise StorageError(f"cannot write {storage.uri}: no space left there")
        return upload(storage, *arguments, **named)

    monkeypatch.setattr(Storage, "upload", refuses)
    first, second = start_gang(tmp_path, local_config(make_config, tmp_path))
    assert (first.wait(), second.wait()) == (0, 0), first.log
    assert committed(checkpoints) == [4, 8]
    assert committed(on_disk(tmp_path)) == []
    assert first.final.saves is not None
    assert (first.final.saves.failed, first.final.saves.failed_in_row) == (2, 0)
    assert len([notice for notice in first.final.notices if "cannot be kept on the nodes' disks" in notice]) == 1


def test_with_memory_for_a_part_of_the_state_it_goes_through_in_pieces(
    tmp_path: Path, make_config: MakeConfig, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("writer", "pipeline"):
        monkeypatch.setattr(f"pylon_trainer.checkpoint.{module}.PART_BYTES", 16384)
    write_within(monkeypatch)
    save_at_once(monkeypatch)
    monkeypatch.setattr("pylon_trainer.checkpoint.pipeline.default_budget_bytes", lambda _: 32768)
    exit_code, pod = run_pod(tmp_path, make_config())
    assert exit_code == 0, pod.log
    assert any("does not hold this rank's share" in notice for notice in pod.final.notices)
    exit_code, again = run_pod(tmp_path, make_config(attempt=2, schedule={"steps": 9}))
    assert exit_code == 0, again.log
    assert list(again.values("loss")) == [9]
