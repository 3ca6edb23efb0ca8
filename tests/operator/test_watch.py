"""List and watch: nothing is lost, whatever happens to the connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fake_api_server import HASTY, FakeApiServer

from pylon_api import names
from pylon_operator import watch as watch_module
from pylon_operator.api import Api
from pylon_operator.kinds import PODS, SERVICES
from pylon_operator.store import JobKey, Store
from pylon_operator.watch import Watch

Eventually = Callable[[Callable[[], object]], Awaitable[None]]


def a_pod(name: str, phase: str = "Pending", namespace: str = "team") -> dict[str, Any]:
    labels = {names.LABEL_APP: names.APP, names.LABEL_JOB: "demo", names.LABEL_JOB_UID: "u1"}
    return {"metadata": {"name": name, "namespace": namespace, "labels": labels}, "status": {"phase": phase}}


class Seen:
    """A store of pods' phases and what it reported."""

    def __init__(self) -> None:
        self.marked: list[JobKey] = []
        self.store: Store[str] = Store(lambda pod: pod["status"]["phase"], self.marked.append)

    def phases(self) -> dict[str, str]:
        return self.store.of("u1")


@pytest.fixture
def seen() -> Seen:
    return Seen()


@asynccontextmanager
async def watching(api: Api, seen: Seen, **options: Any) -> AsyncIterator[Watch]:
    watch = Watch(api, options.pop("resource", PODS), seen.store, backoff=HASTY, **options)
    task = asyncio.create_task(watch.run())
    try:
        async with asyncio.timeout(10):
            await watch.synced.wait()
            yield watch
    finally:
        task.cancel()


async def test_a_long_list_comes_in_pages(
    server: FakeApiServer, api: Api, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "CHUNK", 3)
    for number in range(8):
        server.put("pods", a_pod(f"p{number}"))
    async with watching(api, seen):
        assert len(seen.phases()) == 8
    lists = [r.query for r in server.requests if "watch" not in r.query]
    assert [(q["limit"], q.get("continue")) for q in lists] == [("3", None), ("3", "3"), ("3", "6")]
    assert {q["labelSelector"] for q in lists} == {"app.kubernetes.io/managed-by=pylon"}


async def test_changes_arrive_and_mark_the_job(
    server: FakeApiServer, api: Api, seen: Seen, eventually: Eventually
) -> None:
    async with watching(api, seen):
        server.put("pods", a_pod("p0"))
        await eventually(lambda: seen.phases() == {"p0": "Pending"})
        server.put("pods", a_pod("p0", "Running"))
        await eventually(lambda: seen.phases() == {"p0": "Running"})
        server.remove("pods", "team", "p0")
        await eventually(lambda: seen.phases() == {})
    assert seen.marked == [("team", "demo")] * 3


async def test_a_broken_stream_goes_on_where_it_was(
    server: FakeApiServer, api: Api, seen: Seen, eventually: Eventually
) -> None:
    async with watching(api, seen):
        await eventually(lambda: server.streams)
        for number in range(3):
            server.put("pods", a_pod(f"p{number}"))
            server.break_streams()
        await eventually(lambda: len(seen.phases()) == 3)
    assert len([r for r in server.requests if "watch" not in r.query]) == 1, "it listed again"


async def test_a_forgotten_version_means_a_new_list_in_which_the_vanished_are_noticed(
    server: FakeApiServer, api: Api, seen: Seen, eventually: Eventually
) -> None:
    server.put("pods", a_pod("stays"))
    server.put("pods", a_pod("goes"))
    async with watching(api, seen):
        await eventually(lambda: server.streams)
        server.silent = True
        server.remove("pods", "team", "goes")
        server.put("pods", a_pod("new"))
        server.forget_history()
        server.break_streams()
        await eventually(lambda: seen.phases() == {"stays": "Pending", "new": "Pending"})


async def test_a_silent_stream_is_given_up(server: FakeApiServer, api: Api, seen: Seen, eventually: Eventually) -> None:
    server.silent = True
    async with watching(api, seen, silence_seconds=0.05):
        server.put("pods", a_pod("p0"))
        await eventually(lambda: len([r for r in server.requests if "watch" in r.query]) >= 3)
        assert seen.phases() == {}
        server.silent = False
        await eventually(lambda: seen.phases() == {"p0": "Pending"})


async def test_trouble_at_the_first_list_is_survived(
    server: FakeApiServer, api: Api, seen: Seen, eventually: Eventually
) -> None:
    server.put("pods", a_pod("p0"))
    server.refuse("GET", "/pods", 403, "Forbidden", times=2)
    async with watching(api, seen):
        assert seen.phases() == {"p0": "Pending"}


async def test_only_metadata_is_asked_for(server: FakeApiServer, api: Api, seen: Seen, eventually: Eventually) -> None:
    async with watching(api, seen, resource=SERVICES, metadata_only=True):
        await eventually(lambda: len(server.requests) == 2)
    assert all("PartialObjectMetadata" in request.headers["Accept"] for request in server.requests)


async def test_one_namespace_leaves_another_alone(server: FakeApiServer, api: Api, seen: Seen) -> None:
    seen.store.observe(a_pod("elsewhere", namespace="other") | {"metadata": _metadata("elsewhere", "other", 1)})
    server.put("pods", a_pod("p0"))
    async with watching(api, seen, namespace="team"):
        assert set(seen.phases()) == {"elsewhere", "p0"}


def _metadata(name: str, namespace: str, version: int) -> dict[str, Any]:
    metadata: dict[str, Any] = a_pod(name, namespace=namespace)["metadata"]
    return metadata | {"uid": f"uid-{name}", "resourceVersion": str(version)}


class TestStore:
    """Two sources feed a store: the watch, and the answers to our own writes."""

    def pod(self, version: int, phase: str = "Pending") -> dict[str, Any]:
        return {"metadata": _metadata("p0", "team", version), "status": {"phase": phase}}

    def test_an_older_version_never_wins(self, seen: Seen) -> None:
        seen.store.written(self.pod(5, "Running"))
        seen.store.observe(self.pod(4, "Pending"))
        assert seen.phases() == {"p0": "Running"}

    def test_an_answer_that_comes_after_the_deletion_does_not_bring_it_back(self, seen: Seen) -> None:
        seen.store.observe(self.pod(4))
        seen.store.remove(self.pod(6))
        seen.store.written(self.pod(5))
        assert seen.phases() == {}

    def test_what_does_not_show_in_the_view_marks_nothing(self, seen: Seen) -> None:
        seen.store.observe(self.pod(4))
        seen.store.observe(self.pod(5))
        assert len(seen.marked) == 1

    def test_only_the_deleted_uid_is_dropped(self, seen: Seen) -> None:
        seen.store.observe(self.pod(4))
        seen.store.deleted("team", "p0", "uid-of-an-earlier-one")
        assert seen.phases() == {"p0": "Pending"}
        seen.store.deleted("team", "p0", "uid-p0")
        assert seen.phases() == {}
