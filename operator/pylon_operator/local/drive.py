"""Drives a local job to its end: reconcile, wait, again; what the operator's queue does for a whole cluster."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from pylon_api.job import ConditionStatus, PylonJob
from pylon_api.names import ConditionType
from pylon_operator.local.cluster import LocalCluster
from pylon_operator.local.state import ended
from pylon_operator.reconcile import reconcile


async def drive(cluster: LocalCluster, on_update: Callable[[], None], last_seen: datetime | None) -> PylonJob:
    """Runs the cluster's job until it has ended or is suspended. Returns it as the resource would then be.

    A job whose last run was cut short counts as suspended since `last_seen`, when that run last saved its status: no
    restart is counted, and no running time since.
    """
    wanted = cluster.job.spec.suspend
    if last_seen and cluster.job.status.attempt and not suspended(cluster.job):
        cluster.set_suspend(True)
        await _settle(cluster, lambda: None, lambda: last_seen)
        cluster.set_suspend(wanted)
    return await _settle(cluster, on_update, lambda: datetime.now(UTC))


def suspended(job: PylonJob) -> bool:
    """Whether the job is suspended and no pod of it is left."""
    return any(
        condition.type == ConditionType.SUSPENDED and condition.status is ConditionStatus.TRUE
        for condition in job.status.conditions
    )


async def _settle(cluster: LocalCluster, on_update: Callable[[], None], clock: Callable[[], datetime]) -> PylonJob:
    metadata = cluster.job.metadata
    while True:
        delay = await reconcile(cluster, metadata.namespace, metadata.name, clock())
        on_update()
        if ended(cluster.job) or (cluster.job.spec.suspend and suspended(cluster.job)):
            return cluster.job
        await cluster.wait(delay)
