"""The cluster adapter: what it sends, whose objects it touches, and what a decision gets to see."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from fake_api_server import FakeApiServer
from operator_builders import a_job

from pylon_api import names
from pylon_api.job import PylonJob
from pylon_api.manifest import ManifestError
from pylon_api.names import Reason
from pylon_operator.api import APPLY_PATCH, MERGE_PATCH, Api
from pylon_operator.api_errors import Conflict, NamespaceTerminating
from pylon_operator.children import Children
from pylon_operator.cluster import KubernetesCluster
from pylon_operator.errors import Refused
from pylon_operator.events import EventPoster
from pylon_operator.observation import (
    Action,
    AnnotateTopology,
    CreateAttempt,
    DeleteAttempt,
    DeleteJob,
    EmitEvent,
    ForceDeletePod,
    Observed,
    RequestCheckpoint,
)
from pylon_operator.poll import Poller
from pylon_operator.status import report_invalid
from pylon_operator.store import JobKey

Eventually = Callable[[Callable[[], object]], Awaitable[None]]
CREATED = [("services", "demo-a1"), ("configmaps", "demo-a1"), ("secrets", "demo-5f3a9c1e"), ("jobs", "demo-a1")]


class World:
    """A cluster over a fake API server that holds one PylonJob, `team/demo`."""

    def __init__(self, server: FakeApiServer, api: Api, poller: Poller) -> None:
        self.server, self.api = server, api
        self.marked: list[JobKey] = []
        self.children = Children(self.marked.append)
        self.events = EventPoster(api, "test")
        self.cluster = KubernetesCluster(
            api, self.children, poller, self.events, default_image="trainer:1", token_key=b"k" * 32
        )
        server.put("pylonjobs", _manifest(a_job()))

    async def observe(self) -> Observed:
        observed = await self.cluster.observe("team", "demo")
        assert observed is not None
        return observed

    async def job(self) -> PylonJob:
        return (await self.observe()).job

    async def apply(self, action: Action) -> None:
        await self.cluster.apply(await self.job(), action)

    async def started(self) -> None:
        """Attempt 1 is on record and created."""
        job = await self.job()
        await self.cluster.write_status(job, job.status.model_copy(update={"attempt": 1}))
        await self.apply(CreateAttempt(1))

    def held(self, plural: str, name: str) -> dict[str, Any]:
        return self.server.objects[plural, "team", name]


@pytest.fixture
async def world(server: FakeApiServer, api: Api) -> AsyncIterator[World]:
    async with Poller(lambda key: None) as poller:
        yield World(server, api, poller)


def _manifest(job: PylonJob) -> dict[str, Any]:
    metadata = {"name": "demo", "namespace": "team", "uid": job.metadata.uid, "generation": 1}
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": metadata,
        "spec": job.spec.to_wire(),
    }


async def test_an_attempt_is_created_in_order_and_seen_at_once(world: World) -> None:
    await world.started()
    posts = world.server.sent("POST")
    made = [(r.path.rsplit("/", 1)[1], r.body["metadata"]["name"]) for r in posts]
    assert sorted(made) == sorted(CREATED)
    assert made[-1] == ("jobs", "demo-a1"), "whoever sees a Job may rely on the rest being there"
    assert {r.query["fieldManager"] for r in posts} == {"pylon-operator"}
    observed = await world.observe()
    assert [attempt.name for attempt in observed.attempts] == ["demo-a1"]
    assert not observed.missing_children
    assert not observed.attempts[0].edited


async def test_creating_twice_changes_nothing_and_reads_no_secret(world: World) -> None:
    await world.started()
    before = {place: obj["metadata"]["uid"] for place, obj in world.server.objects.items()}
    world.children.jobs.deleted("team", "demo-a1", world.held("jobs", "demo-a1")["metadata"]["uid"])  # a lagging cache
    world.children.services.deleted("team", "demo-a1", world.held("services", "demo-a1")["metadata"]["uid"])
    await world.apply(CreateAttempt(1))
    assert {place: obj["metadata"]["uid"] for place, obj in world.server.objects.items()} == before
    assert not [r for r in world.server.sent("GET") if "/secrets" in r.path]
    assert [attempt.name for attempt in (await world.observe()).attempts] == ["demo-a1"]


async def test_an_edited_job_is_put_right_by_server_side_apply_without_its_template(world: World) -> None:
    await world.started()
    edited = world.held("jobs", "demo-a1")
    edited["spec"] |= {"parallelism": 1, "suspend": True}
    world.children.jobs.observe(world.server.put("jobs", edited))
    assert (await world.observe()).attempts[0].edited
    await world.apply(CreateAttempt(1))
    (patch,) = world.server.sent("PATCH", "/jobs/demo-a1")
    assert patch.headers["Content-Type"] == APPLY_PATCH
    assert patch.query == {"fieldManager": "pylon-operator", "force": "true"}
    assert patch.body["spec"] == {"parallelism": 2, "completions": 2, "backoffLimit": 0}
    assert world.held("jobs", "demo-a1")["spec"]["suspend"], "someone else's field was reverted"
    assert not (await world.observe()).attempts[0].edited


async def test_a_job_scaled_as_a_whole_counts_as_edited(world: World) -> None:
    await world.started()
    edited = world.held("jobs", "demo-a1")
    edited["spec"] |= {"parallelism": 1, "completions": 1}
    world.children.jobs.observe(world.server.put("jobs", edited))
    assert (await world.observe()).attempts[0].edited


async def test_a_strangers_object_is_refused_and_left_alone(world: World) -> None:
    theirs = {"kind": "Service", "metadata": {"name": "demo-a1", "namespace": "team"}, "spec": {"mine": True}}
    world.server.put("services", theirs)
    with pytest.raises(Refused, match="Service team/demo-a1 exists and is not this job's") as refused:
        await world.started()
    assert refused.value.reason is Reason.FORBIDDEN
    assert world.held("services", "demo-a1")["spec"] == {"mine": True}
    assert not [key for key in world.server.objects if key[0] == "jobs"]


async def test_what_an_earlier_job_left_is_waited_for(world: World) -> None:
    owner = {"kind": names.KIND, "name": "demo", "uid": "of-an-earlier-job"}
    world.server.put(
        "services",
        {"kind": "Service", "metadata": {"name": "demo-a1", "namespace": "team", "ownerReferences": [owner]}},
    )
    with pytest.raises(Conflict, match="about to be collected"):
        await world.started()


@pytest.mark.parametrize(
    ("status", "reason"), [(403, Reason.FORBIDDEN), (422, Reason.INVALID_SPEC), (400, Reason.INVALID_SPEC)]
)
async def test_a_refused_create_says_which_and_why(world: World, status: int, reason: Reason) -> None:
    world.server.refuse("POST", "/configmaps", status, message="exceeded quota: pods")
    with pytest.raises(Refused, match=r"POST /api/v1/namespaces/team/configmaps: exceeded quota: pods") as refused:
        await world.started()
    assert refused.value.reason is reason


async def test_a_namespace_that_is_being_deleted_is_remembered(world: World) -> None:
    causes = [{"reason": "NamespaceTerminating"}]
    world.server.refuse("POST", "/services", 403, "Forbidden", causes=causes)
    with pytest.raises(NamespaceTerminating):
        await world.started()
    assert (await world.observe()).namespace_terminating


async def test_an_attempt_is_deleted_with_its_uid_and_its_job_last(world: World) -> None:
    await world.started()
    uid = world.held("jobs", "demo-a1")["metadata"]["uid"]
    await world.apply(DeleteAttempt("demo-a1", uid))
    deletes = world.server.sent("DELETE")
    assert [r.path.rsplit("/", 2)[1] for r in deletes] == ["services", "configmaps", "jobs"]
    assert deletes[-1].body["preconditions"] == {"uid": uid}
    assert deletes[-1].body["propagationPolicy"] == "Background"
    assert (await world.observe()).attempts == ()
    await world.apply(DeleteAttempt("demo-a1", uid))  # gone already


async def test_a_successor_of_the_same_name_survives_a_late_delete(world: World) -> None:
    await world.started()
    await world.apply(DeleteAttempt("demo-a1", "uid-of-an-earlier-one"))
    assert world.held("jobs", "demo-a1")


async def test_a_lost_pod_is_deleted_at_once_by_its_uid(world: World) -> None:
    pod = world.server.put("pods", {"metadata": {"name": "demo-a1-0", "namespace": "team"}})
    await world.apply(ForceDeletePod("demo-a1-0", pod["metadata"]["uid"]))
    (delete,) = world.server.sent("DELETE")
    assert delete.body["gracePeriodSeconds"] == 0
    assert delete.body["preconditions"] == {"uid": pod["metadata"]["uid"]}


async def test_the_topology_of_a_pod_is_that_of_its_node(world: World) -> None:
    job = world.held("pylonjobs", "demo")
    job["spec"]["topology"] = {"levels": ["zone", "rack", "row"]}
    world.server.put("pylonjobs", job)
    world.server.put("nodes", {"metadata": {"name": "n1", "labels": {"zone": "z", "row": "7"}}})
    pods = [world.server.put("pods", {"metadata": {"name": n, "namespace": "team"}}) for n in ("p0", "p1")]
    for pod in pods:
        await world.apply(AnnotateTopology(pod["metadata"]["name"], pod["metadata"]["uid"], "n1"))
    domains = world.held("pods", "p1")["metadata"]["annotations"][names.ANNOTATION_TOPOLOGY]
    assert json.loads(domains) == ["z", "", "7", "n1"]
    assert len(world.server.sent("GET", "/nodes/n1")) == 1
    await world.apply(AnnotateTopology("p0", "of-an-earlier-pod", "n1"))  # refused by its uid, and no error


async def test_without_levels_no_node_is_read(world: World) -> None:
    pod = world.server.put("pods", {"metadata": {"name": "p0", "namespace": "team"}})
    await world.apply(AnnotateTopology("p0", pod["metadata"]["uid"], "n1"))
    assert json.loads(world.held("pods", "p0")["metadata"]["annotations"][names.ANNOTATION_TOPOLOGY]) == ["n1"]
    assert not world.server.sent("GET", "/nodes/n1")


async def test_the_status_is_merged_into_the_job_that_was_observed(world: World) -> None:
    job = await world.job()
    await world.cluster.write_status(job, job.status.model_copy(update={"attempt": 1, "suspend_step": 5}))
    await world.observe()
    held = world.held("pylonjobs", "demo")
    held["status"]["someone"] = "else"
    world.server.put("pylonjobs", held)
    job = await world.job()
    await world.cluster.write_status(job, job.status.model_copy(update={"suspend_step": None, "attempt": 2}))
    status = world.held("pylonjobs", "demo")["status"]
    assert (status["attempt"], status["someone"]) == (2, "else")
    assert "suspendStep" not in status
    assert status["restarts"] == 0, "columns show nothing for a default that was never written"
    assert {r.headers["Content-Type"] for r in world.server.sent("PATCH", "/status")} == {MERGE_PATCH}


async def test_a_stale_operator_cannot_write(world: World) -> None:
    stale = await world.job()
    world.server.put("pylonjobs", world.held("pylonjobs", "demo"))
    with pytest.raises(Conflict):
        await world.cluster.write_status(stale, stale.status.model_copy(update={"attempt": 7}))
    assert "status" not in world.held("pylonjobs", "demo")


async def test_the_look_after_a_write_costs_no_read_and_sees_the_write(world: World) -> None:
    job = await world.job()
    await world.cluster.write_status(job, job.status.model_copy(update={"attempt": 1}))
    reads = len(world.server.sent("GET", "/demo"))
    written = await world.job()
    assert written.status.attempt == 1
    assert len(world.server.sent("GET", "/demo")) == reads
    world.server.put("pylonjobs", world.held("pylonjobs", "demo"))
    assert (await world.job()).metadata.resource_version != written.metadata.resource_version


async def test_our_own_write_is_no_news_and_anyone_elses_is(world: World) -> None:
    job, key = await world.job(), ("team", "demo")
    assert world.cluster.is_news(key, job.metadata.resource_version)
    await world.cluster.write_status(job, job.status.model_copy(update={"attempt": 1}))
    assert not world.cluster.is_news(key, world.held("pylonjobs", "demo")["metadata"]["resourceVersion"])
    theirs = world.server.put("pylonjobs", world.held("pylonjobs", "demo"))
    assert world.cluster.is_news(key, theirs["metadata"]["resourceVersion"])


@pytest.mark.parametrize("told", ["before our answer", "after our answer"])
async def test_a_change_right_after_our_write_is_seen(world: World, told: str) -> None:
    """The user resumes in the second in which the operator has written `Suspended`."""
    job, key = await world.job(), ("team", "demo")
    news = str(int(job.metadata.resource_version) + 1000)
    if told == "before our answer":
        assert world.cluster.is_news(key, news)
    await world.cluster.write_status(job, job.status.model_copy(update={"attempt": 1}))
    theirs = world.held("pylonjobs", "demo")
    world.server.put("pylonjobs", theirs | {"spec": theirs["spec"] | {"suspend": True}})
    if told == "after our answer":
        assert world.cluster.is_news(key, news)
    assert (await world.job()).spec.suspend


async def test_the_ttl_deletes_exactly_this_job(world: World) -> None:
    job = await world.job()
    await world.cluster.apply(job, DeleteJob("uid-of-an-earlier-one"))
    assert await world.cluster.observe("team", "demo") is not None
    await world.cluster.apply(job, DeleteJob(job.metadata.uid))
    assert await world.cluster.observe("team", "demo") is None


async def test_events_are_posted_behind_the_scenes_and_may_fail(world: World, eventually: Eventually) -> None:
    world.server.refuse("POST", "/events", 403, "Forbidden")
    poster = asyncio.create_task(world.events.run())
    for reason in ("Lost", "Created"):
        await world.apply(EmitEvent("Normal", reason, "x" * 2000))
    await eventually(lambda: len(world.server.sent("POST", "/events")) == 2)
    poster.cancel()
    event = world.server.sent("POST", "/events")[1].body
    assert (event["reason"], len(event["note"])) == ("Created", 1024)
    assert event["regarding"]["uid"] == (await world.job()).metadata.uid


async def test_a_trainer_that_cannot_be_asked_is_no_error(world: World) -> None:
    await world.apply(RequestCheckpoint("127.0.0.254"))


async def test_jobs_of_another_controller_are_left_alone(world: World) -> None:
    job = world.held("pylonjobs", "demo")
    job["spec"] |= {"managedBy": "example.com/other", "nodes": "nonsense"}
    world.server.put("pylonjobs", job)
    assert await world.cluster.observe("team", "demo") is None


async def test_a_job_that_the_models_refuse_is_told_so_once(world: World) -> None:
    job = world.held("pylonjobs", "demo")
    job["spec"]["nodes"] = 0
    world.server.put("pylonjobs", job)
    with pytest.raises(ManifestError) as refused:
        await world.cluster.observe("team", "demo")
    for _ in range(3):
        await report_invalid(world.api, "team", "demo", refused.value.problems)
    assert len(world.server.sent("PATCH", "/status")) == 1
    (condition,) = world.held("pylonjobs", "demo")["status"]["conditions"]
    assert (condition["type"], condition["status"], condition["reason"]) == ("Succeeded", "False", "InvalidSpec")
    assert condition["message"].startswith("spec.nodes: ")


async def test_only_a_running_rank_0_of_the_current_attempt_is_polled(world: World) -> None:
    await world.started()
    job = await world.job()
    for name, attempt, index, phase in (
        ("old", 0, 0, "Running"),
        ("rank0", 1, 0, "Running"),
        ("rank1", 1, 1, "Running"),
        ("pending", 1, 0, "Pending"),
    ):
        labels = {
            names.LABEL_JOB: "demo",
            names.LABEL_JOB_UID: job.metadata.uid,
            names.LABEL_ATTEMPT: str(attempt),
            names.LABEL_COMPLETION_INDEX: str(index),
        }
        metadata = {"name": name, "namespace": "team", "labels": labels}
        pod = world.server.put("pods", {"metadata": metadata, "status": {"phase": phase, "podIP": f"ip-{name}"}})
        world.children.pods.observe(pod)
    assert [target.ip for target in world.cluster.targets()] == ["ip-rank0"]
