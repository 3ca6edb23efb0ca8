"""The loop around a reconcile: what goes wrong is tried again, shown, and stops nobody else."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import cast

import pytest
from fake_api_server import FakeApiServer

from pylon_api.manifest import ManifestError
from pylon_operator import controller as module
from pylon_operator.api import Api, Patience
from pylon_operator.api_errors import Conflict, Forbidden, Unreachable
from pylon_operator.cluster import Current, KubernetesCluster
from pylon_operator.controller import Controller
from pylon_operator.due import DueSet
from pylon_operator.lease import LeaseLost
from pylon_operator.store import JobKey

Eventually = Callable[[Callable[[], object]], Awaitable[None]]
A, B = ("team", "a"), ("team", "b")
SOON = Patience(backoff_seconds=0.002, backoff_limit_seconds=0.002)


class Reconciles:
    """In place of `reconcile`: plays what each job's script says, then succeeds."""

    def __init__(self) -> None:
        self.script: dict[JobKey, list[Exception | float | None]] = {}
        self.seen: list[JobKey] = []

    async def __call__(self, cluster: object, namespace: str, name: str, now: object) -> float | None:
        key = (namespace, name)
        self.seen.append(key)
        step = self.script[key].pop(0) if self.script.get(key) else None
        if isinstance(step, Exception):
            raise step
        return step


@pytest.fixture
def reconciles(monkeypatch: pytest.MonkeyPatch) -> Reconciles:
    fake = Reconciles()
    monkeypatch.setattr(module, "reconcile", fake)
    monkeypatch.setattr(module, "PATIENCE", SOON)
    monkeypatch.setattr(module, "CONFLICT_PATIENCE", SOON)
    monkeypatch.setattr(module, "FORBIDDEN_SECONDS", 0.002)
    return fake


@asynccontextmanager
async def working(api: Api, *due: JobKey) -> AsyncIterator[DueSet[JobKey]]:
    keys: DueSet[JobKey] = DueSet()
    for key in due:
        keys.mark(key)
    cluster = cast(KubernetesCluster, SimpleNamespace(current={A: Current("u", 1, "Running")}))
    task = asyncio.create_task(Controller(api, cluster, keys, workers=2).run())
    try:
        yield keys
    finally:
        task.cancel()


@pytest.mark.parametrize(
    "error",
    [Conflict("PATCH", "/x", "changed"), Unreachable("GET", "/x", "away"), Forbidden("GET", "/x", "no"), KeyError()],
)
async def test_a_failure_is_tried_again(
    api: Api, reconciles: Reconciles, eventually: Eventually, error: Exception
) -> None:
    reconciles.script[A] = [error, error]
    async with working(api, A, B):
        await eventually(lambda: reconciles.seen.count(A) == 3 and reconciles.seen.count(B) == 1)


async def test_a_bug_is_logged_with_its_job_and_attempt(
    api: Api, reconciles: Reconciles, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    reconciles.script[A] = [ZeroDivisionError("oops")]
    async with working(api, A):
        await eventually(lambda: len(reconciles.seen) == 2)
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert (vars(record)["job"], vars(record)["attempt"]) == ("team/a", "1")
    assert record.exc_info


async def test_a_requeue_comes_back(api: Api, reconciles: Reconciles, eventually: Eventually) -> None:
    reconciles.script[A] = [0.001, 0.001]
    async with working(api, A):
        await eventually(lambda: reconciles.seen == [A, A, A])


async def test_a_known_job_is_looked_at_again_though_nothing_happens(
    api: Api, reconciles: Reconciles, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RESYNC_SECONDS", 0.001)
    async with working(api, A, B):
        await eventually(lambda: reconciles.seen.count(A) > 3)
    assert reconciles.seen.count(B) == 1, "a job that is gone is forgotten"


async def test_an_invalid_job_is_told_so_and_left_alone(
    server: FakeApiServer, api: Api, reconciles: Reconciles, eventually: Eventually
) -> None:
    server.put("pylonjobs", {"metadata": {"name": "a", "namespace": "team", "generation": 4}})
    reconciles.script[A] = [ManifestError(["spec.nodes: too few", "spec.image: too long"])]
    async with working(api, A):
        await eventually(lambda: server.sent("PATCH", "/status"))
        condition = server.objects["pylonjobs", "team", "a"]["status"]["conditions"][0]
    assert condition["message"] == "spec.nodes: too few; spec.image: too long"
    assert condition["observedGeneration"] == 4
    assert reconciles.seen == [A]


async def test_a_lost_lease_ends_the_loop(api: Api, reconciles: Reconciles) -> None:
    reconciles.script[A] = [LeaseLost("gone")]
    keys: DueSet[JobKey] = DueSet()
    keys.mark(A)
    cluster = cast(KubernetesCluster, SimpleNamespace(current={}))
    with pytest.raises(ExceptionGroup) as group:
        async with asyncio.timeout(5):
            await Controller(api, cluster, keys).run()
    assert group.group_contains(LeaseLost)
