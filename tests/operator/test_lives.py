"""Whole lives of a job in a simulated cluster, and the same with the operator killed between any two writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_builders import a_job
from simulated_cluster import Death, Happening, SimulatedCluster, live

from pylon_api.job import FailureAction, FailurePolicy, FailureRule
from pylon_api.names import ConditionType, ExitCode
from pylon_operator.conditions import find

POLICY = FailurePolicy(max_restarts=2, backoff_seconds=10)


@dataclass(frozen=True)
class Life:
    """A job, what befalls it, and how it must end."""

    ends: str
    attempts: int
    restarts: int = 0
    phase: str = "Failed"
    spec: dict[str, Any] | None = None
    deaths: dict[int, Death] | None = None
    happenings: tuple[Happening, ...] = ()

    def cluster(self, kill_before_write: int | None = None) -> SimulatedCluster:
        job = a_job(**{"failure_policy": POLICY} | (self.spec or {}))
        return SimulatedCluster(job, deaths=self.deaths or {}, kill_before_write=kill_before_write)


def reached(step: int, attempt: int = 1) -> Any:
    return lambda c: any(gang.view.attempt == attempt and gang.step >= step for gang in c.gangs)


def is_phase(phase: str) -> Any:
    return lambda c: c.job.status.phase == phase


def has_ended(c: SimulatedCluster) -> bool:
    return c.job.status.completion_time is not None


def set_suspend(value: bool) -> Any:
    return lambda c: c.edit(suspend=value)


SUSPEND_AT_30: Happening = (reached(30), set_suspend(True))
RESUME: Happening = (is_phase("Suspended"), set_suspend(False))

LIVES = {
    "success": Life("Completed", attempts=1, phase="Succeeded"),
    "restart from the checkpoint": Life(
        "Completed", attempts=2, restarts=1, phase="Succeeded", deaths={1: Death(step=70)}
    ),
    "death of rank 0": Life("Completed", attempts=2, restarts=1, phase="Succeeded", deaths={1: Death(step=70, pod=0)}),
    "death at one step, again and again": Life(
        "NoProgress", attempts=3, restarts=2, deaths={n: Death(step=70) for n in range(1, 9)}
    ),
    "deaths at several steps before a checkpoint": Life(
        "RestartsExhausted",
        attempts=3,
        restarts=2,
        deaths={1: Death(step=10), 2: Death(step=30), 3: Death(step=20)},
    ),
    "preempted for ever, with progress": Life(
        "Completed",
        attempts=4,
        restarts=3,
        phase="Succeeded",
        spec={
            "training": {"schedule": {"steps": 200}},
            "failure_policy": FailurePolicy(max_restarts=1, backoff_seconds=0),
        },
        deaths={n: Death(step=60 * n, exit_code=ExitCode.STOPPED) for n in range(1, 4)},
    ),
    "bad data": Life(
        "UserError", attempts=1, deaths={1: Death(step=10, exit_code=ExitCode.BAD_DATA, message="no such file: x")}
    ),
    "a rule that fails": Life(
        "FailedByRule",
        attempts=1,
        spec={
            "failure_policy": FailurePolicy(
                rules=[FailureRule(action=FailureAction.FAIL, exit_codes=[ExitCode.OUT_OF_MEMORY])]
            )
        },
        deaths={1: Death(step=10, exit_code=ExitCode.OUT_OF_MEMORY)},
    ),
    "suspended and resumed": Life("Completed", attempts=2, phase="Succeeded", happenings=(SUSPEND_AT_30, RESUME)),
    "suspended from the start, then resumed": Life(
        "Completed", attempts=1, phase="Succeeded", spec={"suspend": True}, happenings=(RESUME,)
    ),
    "deadline": Life("DeadlineExceeded", attempts=1, spec={"active_deadline_seconds": 30}),
    "a Job that somebody deletes": Life(
        "Completed",
        attempts=2,
        restarts=1,
        phase="Succeeded",
        happenings=((reached(60), lambda c: c.delete_batch_job("demo-a1")),),
    ),
    "a node that dies": Life(
        "Completed",
        attempts=2,
        restarts=1,
        phase="Succeeded",
        happenings=(
            (reached(60), lambda c: c.lose_node("node-1")),
            (lambda c: c.job.status.attempt == 2, lambda c: c.dead_nodes.clear()),
        ),
    ),
}


def causes(cluster: SimulatedCluster) -> list[tuple[int, str]]:
    return [(failure.attempt, failure.reason) for failure in cluster.job.status.failures]


def assert_ended(life: Life, cluster: SimulatedCluster) -> None:
    status = cluster.job.status
    succeeded = find(status.conditions, ConditionType.SUCCEEDED)
    assert succeeded is not None
    assert (succeeded.reason, status.phase) == (life.ends, life.phase)
    assert (status.attempt, status.restarts) == (life.attempts, life.restarts)
    assert cluster.created == list(range(1, life.attempts + 1))
    assert status.completion_time is not None
    live_pods = [pod for gang in cluster.gangs for pod in gang.pods.values() if not pod.terminal]
    assert not live_pods, "pods outlive the job"


@pytest.mark.parametrize("name", LIVES)
async def test_life(name: str) -> None:
    life = LIVES[name]
    cluster = await live(life.cluster(), *life.happenings)
    assert_ended(life, cluster)


@pytest.mark.parametrize("downtime_ticks", [0, 3])
@pytest.mark.parametrize("name", LIVES)
async def test_operator_killed_between_any_two_writes(name: str, downtime_ticks: int) -> None:
    life = LIVES[name]
    undisturbed = await live(life.cluster(), *life.happenings)
    for number in range(undisturbed.writes):
        cluster = life.cluster(kill_before_write=number)
        await live(cluster, *life.happenings, downtime_ticks=downtime_ticks)
        assert_ended(life, cluster)
        assert causes(cluster) == causes(undisturbed)


async def test_suspend_saves_first_and_loses_nothing() -> None:
    cluster = LIVES["suspended and resumed"].cluster()
    steps: list[int] = []
    seen: Happening = (is_phase("Suspended"), lambda c: steps.append(c.job.status.checkpoint.step))
    await live(cluster, SUSPEND_AT_30, seen, RESUME)
    assert steps
    assert steps[0] >= 30
    assert cluster.job.status.restarts == 0
    reasons = [event.reason for event in cluster.events]
    assert "SavingBeforeSuspend" in reasons
    assert reasons.count("SuspendedByUser") == 1
    assert reasons.count("Resumed") == 1


async def test_suspend_does_not_wait_for_ever() -> None:
    cluster = SimulatedCluster(
        a_job(checkpoint_timeout_seconds=20, training={"schedule": {"steps": 1000}}),
        commits_on_request=False,
        interval_steps=1000,
    )
    times: dict[str, Any] = {}
    asked: Happening = (lambda c: c.requested, lambda c: times.setdefault("asked", c.now))
    stopped: Happening = (is_phase("Suspended"), lambda c: times.setdefault("stopped", c.now))
    end: Happening = (is_phase("Suspended"), lambda c: None)
    await live(cluster, SUSPEND_AT_30, asked, stopped, end)
    waited = (times["stopped"] - times["asked"]).total_seconds()
    assert 20 <= waited <= 50
    assert "CheckpointTimedOut" in [event.reason for event in cluster.events]


async def test_suspended_time_does_not_count_towards_the_deadline() -> None:
    job = a_job(active_deadline_seconds=100, training={"schedule": {"steps": 120}})
    cluster = SimulatedCluster(job)
    paused: list[Any] = []

    def pause(c: SimulatedCluster) -> None:
        paused.append(c.now)

    long_later: Happening = (
        lambda c: bool(paused) and (c.now - paused[0]).total_seconds() > 300,
        set_suspend(False),
    )
    await live(cluster, SUSPEND_AT_30, (is_phase("Suspended"), pause), long_later)
    assert cluster.job.status.phase == "Succeeded"
    assert cluster.job.status.active_seconds < 100


@pytest.mark.parametrize("kill_before_write", [None, *range(24)])
async def test_ttl_deletes_the_job_once_its_end_is_on_record(kill_before_write: int | None) -> None:
    cluster = SimulatedCluster(a_job(ttl_seconds_after_finished=60), kill_before_write=kill_before_write)
    await live(cluster)
    assert cluster.deleted
    assert cluster.saw_record_before_ttl
    assert (cluster.now - cluster.job.status.completion_time).total_seconds() >= 60
    assert cluster.created == [1], "clean-up must not make a child again"


async def test_each_transition_is_one_event() -> None:
    cluster = await live(LIVES["restart from the checkpoint"].cluster())
    assert [event.reason for event in cluster.events] == [
        "Created",
        "AllPodsReady",
        "Training",
        "Committed",
        "BackingOff",
        "Restarting",
        "Created",
        "AllPodsReady",
        "Training",
        "Completed",
    ]


async def test_numbers_stay_after_the_trainer_is_gone() -> None:
    cluster = await live(LIVES["success"].cluster())
    status = cluster.job.status
    assert status.training is not None
    assert status.checkpoint is not None
    assert (status.training.step, status.checkpoint.step) == (100, 100)


deaths = st.dictionaries(
    st.integers(1, 6),
    st.builds(
        Death,
        step=st.integers(1, 100),
        exit_code=st.sampled_from([ExitCode.INTERNAL, ExitCode.STOPPED, ExitCode.PEER_LOST, ExitCode.STORAGE]),
        pod=st.integers(0, 1),
    ),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    deaths=deaths,
    kill_before_write=st.integers(0, 60),
    downtime_ticks=st.integers(0, 8),
    suspend_at=st.none() | st.integers(1, 99),
    delete_at=st.none() | st.integers(1, 99),
)
async def test_any_mishap_leaves_one_gang_and_an_end(
    deaths: dict[int, Death],
    kill_before_write: int,
    downtime_ticks: int,
    suspend_at: int | None,
    delete_at: int | None,
) -> None:
    happenings: list[Happening] = []
    if suspend_at is not None:
        happenings.append((lambda c: has_ended(c) or reached(suspend_at)(c), set_suspend(True)))
        happenings.append((lambda c: has_ended(c) or is_phase("Suspended")(c), set_suspend(False)))
    if delete_at is not None:
        deletion = lambda c: c.delete_batch_job("demo-a1")  # noqa: E731
        happenings.append((lambda c: has_ended(c) or reached(delete_at)(c), deletion))
    job = a_job(failure_policy=FailurePolicy(max_restarts=20, backoff_seconds=5))
    cluster = SimulatedCluster(job, deaths=deaths, kill_before_write=kill_before_write)
    await live(cluster, *happenings, downtime_ticks=downtime_ticks, ticks=2000)
    status = cluster.job.status
    assert status.phase == "Succeeded"
    assert set(cluster.created) == set(range(1, status.attempt + 1))
    assert len({failure.attempt for failure in status.failures}) == len(status.failures)
