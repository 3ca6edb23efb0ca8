"""The local cluster under the operator's own plan: what a job goes through on one machine."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from local_jobs import fake_job

from pylon_api.job import ConditionStatus, PylonJob
from pylon_api.manifest import parse_job
from pylon_operator.local.cluster import LocalCluster
from pylon_operator.local.drive import drive, suspended
from pylon_operator.local.pods import PodRunner
from pylon_operator.local.state import JobDirectory, StateError, admit, job_directory
from pylon_operator.local.summary import exit_code
from pylon_operator.observation import EmitEvent

pytestmark = pytest.mark.timeout(120)


class Run:
    """One `pylon run` without a terminal. `act` is called after each reconcile."""

    def __init__(self, manifest: dict[str, Any], root: Path) -> None:
        wanted = parse_job(manifest)
        self.directory = job_directory(wanted, root)
        self.directory.path.mkdir(parents=True, exist_ok=True)
        self.job = admit(wanted, self.directory.load())
        self.events: list[EmitEvent] = []

    async def go(self, act: Callable[[LocalCluster], None] = lambda cluster: None) -> PylonJob:
        runner = PodRunner(self.directory.logs)
        async with LocalCluster(self.job, self.directory, runner, on_event=self.events.append) as cluster:
            self.cluster = cluster
            return await drive(cluster, lambda: act(cluster), self.directory.last_saved)

    @property
    def reasons(self) -> list[str]:
        """Reasons of all events."""
        return [event.reason for event in self.events]


def verdict(job: PylonJob) -> tuple[ConditionStatus, str, str]:
    """Succeeded as status, reason and message."""
    condition = next(each for each in job.status.conditions if each.type == "Succeeded")
    return condition.status, condition.reason, condition.message


@pytest.mark.parametrize("nodes", [1, 2])
async def test_success(tmp_path: Path, nodes: int) -> None:
    run = Run(fake_job(tmp_path, nodes=nodes), tmp_path)
    job = await run.go()
    assert verdict(job)[:2] == (ConditionStatus.TRUE, "Completed")
    assert (job.status.attempt, job.status.restarts) == (1, 0)
    assert job.status.training is not None
    assert job.status.training.step == job.status.training.total_steps == 20
    assert job.status.checkpoint is not None
    assert run.cluster.report is not None
    assert run.cluster.report.sample == "def fake(): pass"
    assert run.directory.load() == job
    assert exit_code(job) == 0


async def test_a_failed_pod_takes_the_gang_along_and_the_next_attempt_resumes(tmp_path: Path) -> None:
    deaths = [{"attempt": 1, "rank": 1, "step": 12, "code": 70, "message": "cosmic ray"}]
    run = Run(fake_job(tmp_path, nodes=2, commit_every=5, deaths=deaths), tmp_path)
    job = await run.go()
    assert verdict(job)[0] is ConditionStatus.TRUE
    assert (job.status.attempt, job.status.restarts) == (2, 1)
    assert [(failure.attempt, failure.exit_code, failure.message) for failure in job.status.failures] == [
        (1, 70, "cosmic ray")
    ]
    assert "from step 0" in (run.directory.logs / "demo-a1-0.log").read_text()
    resumed = (run.directory.logs / "demo-a2-0.log").read_text()
    assert "from step 0" not in resumed
    assert "after 1 failures" in resumed, "which the interval of checkpoints goes by"


async def test_a_killed_pod_is_a_failed_one(tmp_path: Path) -> None:
    run = Run(fake_job(tmp_path, nodes=2, steps=100, commit_every=5), tmp_path)
    killed: list[int] = []

    def kill_once(cluster: LocalCluster) -> None:
        training = cluster.job.status.training
        if not killed and training and training.step:
            pod = next(pod for pod in cluster.pods if pod.index == 1)
            killed.append(pod.process.pid)
            os.kill(pod.process.pid, signal.SIGKILL)

    job = await run.go(kill_once)
    assert killed
    assert verdict(job)[0] is ConditionStatus.TRUE
    assert [failure.exit_code for failure in job.status.failures] == [137]


async def test_a_users_mistake_ends_the_job_at_once(tmp_path: Path) -> None:
    said = "training.data.train: no file matches x/*.txt"
    run = Run(fake_job(tmp_path, deaths=[{"attempt": 0, "step": 0, "code": 65, "message": said}]), tmp_path)
    job = await run.go()
    assert verdict(job) == (ConditionStatus.FALSE, "UserError", said)
    assert (job.status.attempt, exit_code(job)) == (1, 65)


async def test_dying_at_one_step_ends_as_no_progress(tmp_path: Path) -> None:
    run = Run(fake_job(tmp_path, deaths=[{"attempt": 0, "step": 3, "code": 70}]), tmp_path)
    job = await run.go()
    assert verdict(job)[:2] == (ConditionStatus.FALSE, "NoProgress")
    assert (job.status.attempt, exit_code(job)) == (4, 1)


async def test_suspend_saves_and_a_second_run_resumes(tmp_path: Path) -> None:
    manifest = fake_job(tmp_path, steps=400, nodes=2)
    first = Run(manifest, tmp_path)

    def suspend(cluster: LocalCluster) -> None:
        if cluster.job.status.training and not cluster.job.spec.suspend:
            cluster.set_suspend(True)

    job = await first.go(suspend)
    assert suspended(job)
    assert exit_code(job) == 75
    assert "SavingBeforeSuspend" in first.reasons
    assert job.status.checkpoint is not None
    saved = job.status.checkpoint.step
    assert saved > 0

    second = Run(manifest, tmp_path)
    assert second.job.metadata.uid == first.job.metadata.uid
    job = await second.go()
    assert verdict(job)[0] is ConditionStatus.TRUE
    assert (job.status.attempt, job.status.restarts, job.status.failures) == (2, 0, [])
    assert "from step 0" not in (second.directory.logs / "demo-a2-0.log").read_text()


async def test_a_run_that_was_cut_short_counts_no_restart(tmp_path: Path) -> None:
    manifest = fake_job(tmp_path, steps=400, commit_every=5)
    first = Run(manifest, tmp_path)
    committed = asyncio.Event()

    def watch(cluster: LocalCluster) -> None:
        if cluster.job.status.checkpoint:
            committed.set()

    running = asyncio.ensure_future(first.go(watch))
    await committed.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    job = await Run(manifest, tmp_path).go()
    assert verdict(job)[0] is ConditionStatus.TRUE
    assert (job.status.attempt, job.status.restarts, job.status.failures) == (2, 0, [])


async def test_pods_that_cannot_be_started_end_the_job_with_the_reason(tmp_path: Path) -> None:
    volume = {"name": "data", "persistentVolumeClaim": {"claimName": "corpus"}}
    manifest = fake_job(tmp_path)
    manifest["spec"]["template"]["spec"]["volumes"] = [volume]
    job = await Run(manifest, tmp_path).go()
    assert verdict(job) == (
        ConditionStatus.FALSE,
        "InvalidSpec",
        "volume 'data' is a persistentVolumeClaim, which only a cluster has",
    )


async def test_secrets_of_the_cluster_give_way_to_the_shells_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.001")
    manifest = fake_job(tmp_path)
    container = manifest["spec"]["template"]["spec"]["containers"][0]
    container["envFrom"] = [{"secretRef": {"name": "store-credentials"}}]
    container["env"][1] = {
        "name": "FAKE_STEP_SECONDS",
        "valueFrom": {"secretKeyRef": {"name": "store-credentials", "key": "key"}},
    }
    assert verdict(await Run(manifest, tmp_path).go())[0] is ConditionStatus.TRUE


async def test_the_deadline_counts_running_time_only(tmp_path: Path) -> None:
    run = Run(fake_job(tmp_path, steps=100000, activeDeadlineSeconds=1), tmp_path)
    job = await run.go()
    assert verdict(job)[:2] == (ConditionStatus.FALSE, "DeadlineExceeded")
    assert job.status.active_seconds >= 1


async def test_topology_reaches_the_pods(tmp_path: Path) -> None:
    run = Run(fake_job(tmp_path, topology={"levels": ["topology.kubernetes.io/zone"]}), tmp_path)
    maps: set[str | None] = set()
    await run.go(lambda cluster: maps.update(pod.view().topology for pod in cluster.pods))
    assert f'["", "{os.uname().nodename}"]' in maps


# What is kept between runs


def kept(job: PylonJob, **status: Any) -> PylonJob:
    """The job as a run with this status would leave it."""
    admitted = admit(job, None)
    return PylonJob.model_validate(admitted.to_wire() | {"status": status})


CHECKPOINT = {"step": 5, "uri": "x"}
SUCCEEDED = {"type": "Succeeded", "lastTransitionTime": "2026-01-01T00:00:00Z", "reason": "r"}


@pytest.mark.parametrize(
    ("status", "kept_uid"),
    [
        ({}, True),
        ({"checkpoint": CHECKPOINT}, True),
        ({"conditions": [SUCCEEDED | {"status": "True"}]}, True),
        ({"conditions": [SUCCEEDED | {"status": "False"}], "checkpoint": CHECKPOINT}, True),
        ({"conditions": [SUCCEEDED | {"status": "False"}]}, False),
    ],
)
def test_a_failed_run_without_a_checkpoint_is_no_obstacle(
    tmp_path: Path, status: dict[str, Any], kept_uid: bool
) -> None:
    wanted = parse_job(fake_job(tmp_path))
    saved = kept(wanted, **status)
    assert (admit(wanted, saved).metadata.uid == saved.metadata.uid) is kept_uid


def test_another_recipe_is_refused_where_something_would_be_lost(tmp_path: Path) -> None:
    saved = kept(parse_job(fake_job(tmp_path, steps=20)), checkpoint=CHECKPOINT)
    other = parse_job(fake_job(tmp_path, steps=30))
    with pytest.raises(StateError, match=r"spec.training.schedule.steps: was 20, now 30, .*--fresh.*metadata.name"):
        admit(other, saved)
    assert admit(other, kept(other)).metadata.uid


def test_what_may_change_keeps_the_job(tmp_path: Path) -> None:
    saved = kept(parse_job(fake_job(tmp_path, commit_every=1)), checkpoint=CHECKPOINT)
    job = admit(parse_job(fake_job(tmp_path, commit_every=2)), saved)
    assert (job.metadata.uid, job.metadata.generation) == (saved.metadata.uid, 2)


def test_one_run_at_a_time(tmp_path: Path) -> None:
    directory = JobDirectory(tmp_path / "job")
    with directory.locked(), pytest.raises(StateError, match=f"process {os.getpid()} is running"), directory.locked():
        pass
    with directory.locked():
        pass


def test_a_damaged_status_is_said(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"kind": ')
    with pytest.raises(StateError, match=r"status.json: damaged.*--fresh"):
        JobDirectory(tmp_path).load()
