"""The operator killed before every one of its writes, on a real API server: one gang at a time, no attempt doubled.

tests/operator/test_lives does the same with many more lives on a simulated cluster; here the server, its garbage
collector and its Job controller are the real ones. Pods stay pending, since there are no nodes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from api import BlockingApi
from applied_job import AppliedJob, Apply
from control_plane import Cluster

from pylon_api import names
from pylon_operator.api import Api
from pylon_operator.api_errors import Conflict
from pylon_operator.children import Children
from pylon_operator.cluster import KubernetesCluster
from pylon_operator.credentials import Credentials, load_credentials
from pylon_operator.events import EventPoster
from pylon_operator.poll import Poller
from pylon_operator.reconcile import reconcile
from pylon_operator.watch import Watch

LOOK_AGAIN_SECONDS = 0.1


class Killed(Exception):
    """The process would end here."""


@dataclass
class MortalOperator:
    """The operator's own parts, without its process: what dies with them starts anew from lists."""

    credentials: Credentials
    kill_before_write: int | None
    writes: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def work(self, job: AppliedJob, until: Callable[[], bool]) -> None:
        """Reconcile until the condition holds, in one life or more."""
        while True:
            with contextlib.suppress(Killed):
                async with asyncio.timeout(60), self._cluster() as cluster:
                    while not until():
                        self.changed.clear()
                        with contextlib.suppress(Conflict):
                            await reconcile(cluster, job.namespace, job.name, datetime.now(UTC))
                        with contextlib.suppress(TimeoutError):
                            await asyncio.wait_for(self.changed.wait(), LOOK_AGAIN_SECONDS)
                    return

    def _count_write(self) -> None:
        number, self.writes = self.writes, self.writes + 1
        if number == self.kill_before_write:
            raise Killed

    @asynccontextmanager
    async def _cluster(self) -> AsyncIterator[KubernetesCluster]:
        children = Children(lambda _: self.changed.set())
        async with AsyncExitStack() as stack:
            api = await stack.enter_async_context(Api(self.credentials, fence=self._count_write))
            poller = await stack.enter_async_context(Poller(lambda _: None))
            watches = [Watch(api, resource, store) for resource, store in children.by_resource.items()]
            for watch in watches:
                stack.callback(asyncio.create_task(watch.run()).cancel)
            for watch in watches:
                await watch.synced.wait()
            events = EventPoster(api, "test")
            yield KubernetesCluster(api, children, poller, events, default_image="none", token_key=b"key")


async def live(job: AppliedJob, operator: MortalOperator, api: BlockingApi) -> dict[str, str]:
    """A job is taken up, loses its Job to somebody else, starts again, and is suspended. uids of its Jobs by name."""
    made: dict[str, str] = {}

    def look() -> list[str]:
        for batch_job in api.list(f"/apis/batch/v1/namespaces/{job.namespace}/jobs"):
            metadata = batch_job["metadata"]
            assert made.setdefault(metadata["name"], metadata["uid"]) == metadata["uid"], "a Job was made twice"
        found = job.batch_jobs()
        assert len(found) <= 1, f"two gangs: {found}"
        return found

    def is_on_record(name: str) -> bool:
        return look() == [name] and job.seen.status.attempt_job_uid == made[name]

    await operator.work(job, lambda: is_on_record(f"{job.name}-a1"))
    gone = f"/apis/batch/v1/namespaces/{job.namespace}/jobs/{job.name}-a1"
    api.delete(gone, propagationPolicy="Background")
    await operator.work(job, lambda: is_on_record(f"{job.name}-a2"))
    job.patch(suspend=True)
    await operator.work(job, lambda: not look() and job.condition("Suspended")[0] == "True")
    return made


async def test_killed_before_every_write(
    crd: None, control_plane: Cluster, apply: Apply, api: BlockingApi, namespace: str
) -> None:
    credentials = load_credentials(control_plane.kubeconfig)

    async def life(number: int | None) -> int:
        manifest = {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "metadata": {"name": "undisturbed" if number is None else f"killed-{number}"},
            "spec": {
                "nodes": 2,
                "failurePolicy": {"backoffSeconds": 0},
                "training": {"data": {"train": ["/data/*.txt"]}, "schedule": {"steps": 1}},
            },
        }
        job = apply(manifest)
        operator = MortalOperator(credentials, number)
        made = await live(job, operator, api)
        status = job.seen.status
        assert set(made) == {f"{job.name}-a1", f"{job.name}-a2"}
        assert (status.attempt, status.restarts, len(status.failures)) == (3, 1, 1)
        return operator.writes

    writes = await life(None)
    assert writes > 10
    for number in range(writes):
        await life(number)
