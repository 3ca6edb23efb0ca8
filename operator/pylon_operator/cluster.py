"""The only place that reads and writes Kubernetes objects of jobs: `reconcile.Cluster` over the API server.

Reads are of two kinds: the PylonJob itself is asked for each time, pods and children come from what the watches keep.
Each write either has a precondition (a version, a uid) or fails when the name is taken, so that neither a stale cache
nor a second operator can do harm, and each answer goes into the store, so that the next decision sees it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import orjson

from pylon_api import names
from pylon_api.job import ConditionStatus, ObjectMeta, PylonJob, PylonJobStatus
from pylon_api.manifest import parse_job
from pylon_api.names import ConditionType, Reason
from pylon_operator.api import APPLY_PATCH, MERGE_PATCH, Api, Resource
from pylon_operator.api_errors import (
    AlreadyExists,
    Conflict,
    Forbidden,
    Invalid,
    NamespaceTerminating,
    NotFound,
)
from pylon_operator.errors import Refused
from pylon_operator.events import EventPoster
from pylon_operator.kinds import BY_KIND, CONFIG_MAPS, JOBS, NODES, PODS, PYLON_JOBS, SERVICES
from pylon_operator.merge_patch import merge_patch
from pylon_operator.observation import (
    Action,
    AnnotateTopology,
    AttemptView,
    CreateAttempt,
    DeleteAttempt,
    DeleteJob,
    EmitEvent,
    ForceDeletePod,
    Observed,
    PodView,
    RequestCheckpoint,
)
from pylon_operator.poll import Poller, Target
from pylon_operator.resources import attempt_name, build_attempt, token_for
from pylon_operator.store import JobKey, Store
from pylon_operator.views import attempt_view, pod_view

logger = logging.getLogger(__name__)

Object = dict[str, Any]

REPAIRABLE: dict[str, tuple[str, ...]] = {
    "Service": ("selector", "ports", "publishNotReadyAddresses"),
    "Job": ("parallelism", "completions", "backoffLimit"),
}
"""Fields of spec that others can change and that are put back. Everything else is immutable, or not ours (Kueue's
suspend).
"""
NODE_LABELS_SECONDS = 600
"""How long a node's labels are taken as known."""
TERMINATING_SECONDS = 60
"""How long a namespace counts as terminating after it refused a create; one of the same name may follow."""


class Children:
    """What the watches keep: pods, Jobs, and that Services and ConfigMaps exist."""

    def __init__(self, changed: Callable[[JobKey], None]) -> None:
        self.pods: Store[PodView] = Store(pod_view, changed)
        self.jobs: Store[tuple[AttemptView, int]] = Store(attempt_view, changed)
        self.services: Store[str] = Store(_uid, changed)
        self.config_maps: Store[str] = Store(_uid, changed)
        self.by_resource: dict[Resource, Store[Any]] = {
            PODS: self.pods,
            JOBS: self.jobs,
            SERVICES: self.services,
            CONFIG_MAPS: self.config_maps,
        }


@dataclass(frozen=True, slots=True)
class Current:
    """What is known of a job from its last observation."""

    uid: str
    attempt: int
    phase: str


class KubernetesCluster:
    """`reconcile.Cluster` over an API server. `default_image` and `token_key` go into the pods."""

    def __init__(
        self,
        api: Api,
        children: Children,
        poller: Poller,
        events: EventPoster,
        *,
        default_image: str,
        token_key: bytes,
    ) -> None:
        self._api = api
        self._children = children
        self._poller = poller
        self._events = events
        self._default_image = default_image
        self._token_key = token_key
        self.current: dict[JobKey, Current] = {}
        """Every job that this operator acts on, for polling and metrics."""
        self._terminating: dict[str, float] = {}
        self._node_labels: dict[str, tuple[float, dict[str, str]]] = {}

    # Reads

    async def observe(self, namespace: str, name: str) -> Observed | None:
        """See `reconcile.Cluster`. Raises ManifestError for a PylonJob that the CRD let through and the models do
        not.
        """
        try:
            found = await self._api.request("GET", PYLON_JOBS.path(namespace, name))
        except NotFound:
            self.current.pop((namespace, name), None)
            return None
        if (found.get("spec") or {}).get("managedBy", names.MANAGED_BY) != names.MANAGED_BY:
            self.current.pop((namespace, name), None)
            return None
        job = parse_job(found)
        uid, status = job.metadata.uid, job.status
        self.current[namespace, name] = Current(uid, status.attempt, status.phase)
        return Observed(
            job=job,
            attempts=tuple(
                replace(view, edited=view.edited or pods != job.spec.nodes)
                for view, pods in self._children.jobs.of(uid).values()
            ),
            pods=tuple(self._children.pods.of(uid).values()),
            trainer=self._poller.status(uid, status.attempt),
            namespace_terminating=time.monotonic() < self._terminating.get(namespace, 0),
            missing_children=self._missing(job),
        )

    def targets(self) -> Iterator[Target]:
        """Rank 0 of every job whose current attempt has one that runs."""
        for key, current in list(self.current.items()):
            for pod in self._children.pods.of(current.uid).values():
                if pod.index == 0 and pod.attempt == current.attempt and pod.phase == "Running" and pod.ip:
                    yield Target(key, current.uid, current.attempt, pod.ip)

    def _missing(self, job: PylonJob) -> frozenset[str]:
        if job.status.attempt == 0:
            return frozenset()
        name, uid = attempt_name(job.metadata.name, job.status.attempt), job.metadata.uid
        stores = {"Service": self._children.services, "ConfigMap": self._children.config_maps}
        return frozenset(kind for kind, store in stores.items() if name not in store.of(uid))

    # Writes

    async def write_status(self, job: PylonJob, status: PylonJobStatus) -> None:
        """See `reconcile.Cluster`. Raises Conflict when the job is no longer the one that was observed."""
        # Only what the server holds, so that defaults are written too: columns show them.
        stored = job.status.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_unset=True)
        await self._patch_status(job.metadata, merge_patch(stored, status.to_wire()))

    async def report_invalid(self, namespace: str, name: str, problems: list[str]) -> None:
        """Show on a PylonJob that cannot be parsed what is wrong with it: condition Succeeded, unless it says so
        already.
        """
        try:
            found = await self._api.request("GET", PYLON_JOBS.path(namespace, name))
        except NotFound:
            return
        metadata = ObjectMeta.model_validate(found["metadata"])
        conditions = (found.get("status") or {}).get("conditions") or []
        told = with_invalid(conditions, "; ".join(problems), metadata.generation, datetime.now(UTC))
        if told != conditions:
            await self._patch_status(metadata, {"conditions": told, "observedGeneration": metadata.generation})

    async def _patch_status(self, metadata: ObjectMeta, patch: Object) -> None:
        await self._api.request(
            "PATCH",
            PYLON_JOBS.path(metadata.namespace, metadata.name, "status"),
            query={"fieldManager": names.FIELD_MANAGER},
            body={"metadata": {"resourceVersion": metadata.resource_version}, "status": patch},
            content_type=MERGE_PATCH,
        )

    async def apply(self, job: PylonJob, action: Action) -> None:
        """See `reconcile.Cluster`."""
        try:
            await self._apply(job, action)
        except NamespaceTerminating:
            self._terminating[job.metadata.namespace] = time.monotonic() + TERMINATING_SECONDS
            raise
        except Forbidden as error:
            raise Refused(Reason.FORBIDDEN, str(error)) from error
        except Invalid as error:
            raise Refused(Reason.INVALID_SPEC, str(error)) from error

    async def _apply(self, job: PylonJob, action: Action) -> None:
        namespace = job.metadata.namespace
        match action:
            case CreateAttempt(attempt):
                token = token_for(self._token_key, job.metadata.uid)
                for obj in build_attempt(job, attempt, default_image=self._default_image, token=token):
                    await self._ensure(job, obj)
            case DeleteAttempt(name, uid):
                await self._delete_attempt(job, name, uid)
            case ForceDeletePod(name, uid):
                await self._delete(PODS, namespace, name, uid, gracePeriodSeconds=0)
            case AnnotateTopology(pod, uid, node):
                await self._annotate(job, pod, uid, node)
            case RequestCheckpoint(ip):
                if not await self._poller.request_checkpoint(ip, token_for(self._token_key, job.metadata.uid)):
                    logger.warning("rank 0 did not take the request to save", extra=_about(job))
            case DeleteJob(uid):
                await self._delete(PYLON_JOBS, namespace, job.metadata.name, uid)
            case EmitEvent():
                self._events.post(job, action)

    async def _ensure(self, job: PylonJob, obj: Object) -> None:
        """Create `obj`, or put right what is already there and ours.

        Created by POST, which fails where the name is taken: a server-side apply would merge into a stranger's object,
        and with our owner reference on it the garbage collector would take it.
        """
        resource = BY_KIND[obj["kind"]]
        namespace, name = obj["metadata"]["namespace"], obj["metadata"]["name"]
        store = self._children.by_resource.get(resource)
        if store is None or name not in store.of(job.metadata.uid):
            try:
                query = {"fieldManager": names.FIELD_MANAGER}
                created = await self._api.request("POST", resource.path(namespace), query=query, body=obj)
                if store is not None:
                    store.written(created)
                return
            except AlreadyExists:
                if store is None:  # the Secret: its name holds the uid of the job, and it may not be read
                    return
                found = await self._api.request("GET", resource.path(namespace, name))
                _check_owner(job, found)
                store.written(found)
        if obj["kind"] in REPAIRABLE:
            assert store is not None
            store.written(await self._repair(resource, obj))

    async def _repair(self, resource: Resource, obj: Object) -> Object:
        metadata = {key: obj["metadata"][key] for key in ("name", "namespace", "labels", "ownerReferences")}
        spec = {key: obj["spec"][key] for key in REPAIRABLE[obj["kind"]]}
        return await self._api.request(
            "PATCH",
            resource.path(metadata["namespace"], metadata["name"]),
            query={"fieldManager": names.FIELD_MANAGER, "force": "true"},
            body={"apiVersion": obj["apiVersion"], "kind": obj["kind"], "metadata": metadata, "spec": spec},
            content_type=APPLY_PATCH,
        )

    async def _delete_attempt(self, job: PylonJob, name: str, uid: str) -> None:
        """The Job last: while it is there, a restarted operator knows that there is something left to delete."""
        namespace, children = job.metadata.namespace, self._children
        for resource, store in ((SERVICES, children.services), (CONFIG_MAPS, children.config_maps)):
            child_uid = store.of(job.metadata.uid).get(name)
            if child_uid is not None:
                await self._delete(resource, namespace, name, child_uid)
        await self._delete(JOBS, namespace, name, uid, propagationPolicy="Background")

    async def _delete(self, resource: Resource, namespace: str, name: str, uid: str, **options: object) -> None:
        """Delete exactly the object of this uid; another one of its name, or none, is as good as deleted."""
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": uid}, **options}
        try:
            answer = await self._api.request("DELETE", resource.path(namespace, name), body=body)
        except (NotFound, Conflict):
            answer = {}
        store = self._children.by_resource.get(resource)
        if store is None:
            return
        if answer.get("kind") == resource.kind:  # a finalizer or a grace period keeps it for now
            store.written(answer)
        else:
            store.deleted(namespace, name, uid)

    async def _annotate(self, job: PylonJob, pod: str, uid: str, node: str) -> None:
        labels = await self._labels(node)
        domains = [labels.get(level, "") for level in job.spec.topology.levels] + [node]
        annotations = {names.ANNOTATION_TOPOLOGY: orjson.dumps(domains).decode()}
        try:
            patched = await self._api.request(
                "PATCH",
                PODS.path(job.metadata.namespace, pod),
                query={"fieldManager": names.FIELD_MANAGER},
                body={"metadata": {"uid": uid, "annotations": annotations}},
                content_type=MERGE_PATCH,
            )
        except (NotFound, Conflict):
            return  # another pod has that name by now; the watch will tell
        self._children.pods.written(patched)

    async def _labels(self, node: str) -> dict[str, str]:
        known = self._node_labels.get(node)
        if known is not None and time.monotonic() - known[0] < NODE_LABELS_SECONDS:
            return known[1]
        try:
            metadata = (await self._api.request("GET", NODES.path(name=node)))["metadata"]
        except NotFound:
            metadata = {}
        labels: dict[str, str] = metadata.get("labels") or {}
        self._node_labels[node] = (time.monotonic(), labels)
        return labels


def with_invalid(conditions: list[Object], message: str, generation: int, now: datetime) -> list[Object]:
    """`conditions` (as they stand in JSON) with Succeeded=False, InvalidSpec; the same list when it says so already."""
    old = next((c for c in conditions if c["type"] == ConditionType.SUCCEEDED), {})
    new = {
        "type": ConditionType.SUCCEEDED.value,
        "status": ConditionStatus.FALSE.value,
        "reason": Reason.INVALID_SPEC.value,
        "message": message,
        "observedGeneration": generation,
    }
    if old | new == old:
        return conditions
    since = old["lastTransitionTime"] if old.get("status") == new["status"] else now.isoformat(timespec="seconds")
    return [*(c for c in conditions if c is not old), new | {"lastTransitionTime": since}]


def _check_owner(job: PylonJob, found: Object) -> None:
    """Raises Refused for a stranger's object, and Conflict (try again) for what an earlier job of this name left."""
    metadata = found["metadata"]
    owners = metadata.get("ownerReferences") or []
    if any(owner["uid"] == job.metadata.uid for owner in owners):
        return
    what = f"{found['kind']} {metadata['namespace']}/{metadata['name']}"
    if any((owner["kind"], owner["name"]) == (names.KIND, job.metadata.name) for owner in owners):
        raise Conflict("POST", what, "belongs to an earlier job of this name and is about to be collected", 409)
    raise Refused(Reason.FORBIDDEN, f"{what} exists and is not this job's: delete it or rename the job")


def _about(job: PylonJob) -> dict[str, object]:
    return {"job": f"{job.metadata.namespace}/{job.metadata.name}", "attempt": job.status.attempt}


def _uid(obj: Object) -> str:
    return str(obj["metadata"]["uid"])
