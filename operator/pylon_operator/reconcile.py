"""One reconcile: observe, plan, apply, write the status once. Level-triggered, so running it twice changes nothing.

It decides nothing (see plan) and knows no API (see Cluster); a real cluster, the local run and the tests' simulated
cluster all run through it.
"""

from __future__ import annotations

from datetime import datetime
from typing import Protocol

from pylon_api.job import PylonJob, PylonJobStatus
from pylon_operator.errors import Refused
from pylon_operator.observation import Action, EmitEvent, Observed
from pylon_operator.plan import plan, refuse


class Cluster(Protocol):
    """Where jobs live. Whatever a retry may mend is raised; the caller of `reconcile` retries with its own back-off."""

    async def observe(self, namespace: str, name: str) -> Observed | None:
        """The job with all its Jobs and pods, of every attempt; None when there is no such job.

        Must show every write that this process has made: a cache that lags behind `write_status` or `apply` would let
        an attempt be taken for deleted, or an old one for the current one.
        """
        ...

    async def apply(self, job: PylonJob, action: Action) -> None:
        """Do one action. Done already is no error: what exists and is ours is adopted, what is gone stays gone.

        Raises Refused when the objects themselves are at fault. RequestCheckpoint and EmitEvent are best effort and
        raise nothing: a trainer that does not answer is what the timeout of the plan is for.
        """
        ...

    async def write_status(self, job: PylonJob, status: PylonJobStatus) -> None:
        """Replace the job's status, only if the job still has the resourceVersion that was observed."""
        ...


async def reconcile(cluster: Cluster, namespace: str, name: str, now: datetime) -> float | None:
    """Bring one job a step further. Seconds until it wants to be looked at again, None to wait for an event."""
    while True:
        observed = await cluster.observe(namespace, name)
        if observed is None:
            return None
        decision = plan(observed, now)
        try:
            for action in decision.actions:
                if not isinstance(action, EmitEvent):
                    await cluster.apply(observed.job, action)
        except Refused as refusal:
            decision = refuse(observed, refusal, now)
        if decision.status != observed.job.status:
            await cluster.write_status(observed.job, decision.status)
        # Events tell what is on record, so they follow the record.
        for action in decision.actions:
            if isinstance(action, EmitEvent):
                await cluster.apply(observed.job, action)
        if decision.requeue_after_seconds != 0:
            return decision.requeue_after_seconds
