"""What reconcile itself promises: refusals end in a condition, one status write, events after the record."""

from __future__ import annotations

import pytest
from operator_builders import NOW, a_job
from simulated_cluster import SimulatedCluster

from pylon_api.job import PylonJob, PylonJobStatus
from pylon_api.names import ConditionType, Reason
from pylon_operator.conditions import find
from pylon_operator.errors import Refused
from pylon_operator.observation import Action, CreateAttempt, EmitEvent
from pylon_operator.reconcile import reconcile


class RefusingCluster(SimulatedCluster):
    """Its API server will not have the objects."""

    refusal: Refused | None = None

    async def apply(self, job: PylonJob, action: Action) -> None:
        if self.refusal and isinstance(action, CreateAttempt):
            raise self.refusal
        await super().apply(job, action)


class RecordingCluster(SimulatedCluster):
    log: tuple[str, ...] = ()

    async def apply(self, job: PylonJob, action: Action) -> None:
        self.log += (type(action).__name__,)
        await super().apply(job, action)

    async def write_status(self, job: PylonJob, status: PylonJobStatus) -> None:
        self.log += ("status",)
        await super().write_status(job, status)


async def test_nothing_to_do_for_a_job_that_is_gone() -> None:
    cluster = SimulatedCluster(a_job(), deleted=True)
    assert await reconcile(cluster, "team", "demo", NOW) is None
    assert cluster.writes == 0


async def test_an_invalid_template_ends_the_job_in_one_reconcile() -> None:
    cluster = RefusingCluster(a_job())
    cluster.refusal = Refused(Reason.INVALID_SPEC, "spec.template.spec.containers: should be a list")
    assert await reconcile(cluster, "team", "demo", NOW) is None
    succeeded = find(cluster.job.status.conditions, ConditionType.SUCCEEDED)
    assert succeeded is not None
    assert (succeeded.reason, succeeded.message) == ("InvalidSpec", cluster.refusal.message)
    assert [event.reason for event in cluster.events] == ["Created", "InvalidSpec"]


async def test_a_refusal_that_passes_is_tried_again() -> None:
    cluster = RefusingCluster(a_job())
    cluster.refusal = Refused(Reason.FORBIDDEN, "exceeded quota: pods=2")
    assert await reconcile(cluster, "team", "demo", NOW) == 60
    running = find(cluster.job.status.conditions, ConditionType.RUNNING)
    assert running is not None
    assert (running.reason, running.message) == ("Forbidden", "exceeded quota: pods=2")
    assert [event.reason for event in cluster.events] == ["Created", "Forbidden"]

    await reconcile(cluster, "team", "demo", NOW)
    assert len(cluster.events) == 2, "the same refusal is told once"

    cluster.refusal = None
    await reconcile(cluster, "team", "demo", NOW)
    assert cluster.created == [1]


async def test_a_new_job_takes_one_reconcile_and_one_status_write_before_its_objects() -> None:
    cluster = RecordingCluster(a_job())
    await reconcile(cluster, "team", "demo", NOW)
    assert cluster.log == ("status", "EmitEvent", "CreateAttempt")


async def test_a_settled_job_costs_no_write() -> None:
    cluster = SimulatedCluster(a_job(suspend=True))
    await reconcile(cluster, "team", "demo", NOW)
    writes = cluster.writes
    assert await reconcile(cluster, "team", "demo", NOW) is None
    assert cluster.writes == writes


@pytest.mark.parametrize("managed_by", ["kueue.x-k8s.io/multikueue"])
async def test_another_controllers_job_costs_no_write(managed_by: str) -> None:
    cluster = SimulatedCluster(a_job(managed_by=managed_by))
    assert await reconcile(cluster, "team", "demo", NOW) is None
    assert cluster.writes == 0
    assert not any(isinstance(event, EmitEvent) for event in cluster.events)
