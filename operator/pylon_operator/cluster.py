"""The only place that reads and writes Kubernetes objects of jobs: `reconcile.Cluster` over the API server.

Reads are of two kinds: the PylonJob itself is asked for each time, pods and children come from what the watches keep.
Each write either has a precondition (a version, a uid) or fails when the name is taken, so that neither a stale cache
nor a second operator can do harm, and each answer goes into the store, so that the next decision sees it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import orjson

from pylon_api import names
from pylon_api.job import PylonJob, PylonJobStatus
from pylon_api.manifest import parse_job
from pylon_api.names import Reason
from pylon_operator.api import MERGE_PATCH, Api, Resource
from pylon_operator.api_errors import (
    Conflict,
    Forbidden,
    Invalid,
    NamespaceTerminating,
    NotFound,
)
from pylon_operator.children import Children
from pylon_operator.errors import Refused
from pylon_operator.events import EventPoster
from pylon_operator.kinds import CONFIG_MAPS, JOBS, PODS, PYLON_JOBS, SERVICES
from pylon_operator.local_checkpoints import refuse_lost_copies
from pylon_operator.merge_patch import merge_patch
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
from pylon_operator.ownership import ensure
from pylon_operator.poll import Poller, Target
from pylon_operator.resources import attempt_name, build_attempt, token_for
from pylon_operator.status import patch_status
from pylon_operator.store import JobKey
from pylon_operator.topology import NodeLabels

logger = logging.getLogger(__name__)

Object = dict[str, Any]

OWN_WRITE_SECONDS = 1.0
"""How long the answer to our own status write stands for a read of the job: for the look that follows the write."""
TERMINATING_SECONDS = 60
"""How long a namespace counts as terminating after it refused a create; one of the same name may follow."""


@dataclass(frozen=True, slots=True)
class Current:
    """What is known of a job from its last observation."""

    uid: str
    attempt: int
    phase: str


@dataclass(slots=True)
class Written:
    """Our last write of a job's status: the version that it made, and for a moment the whole answer."""

    version: str
    answer: Object | None
    time: float


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
        self._written: dict[JobKey, Written] = {}
        self._heard: dict[JobKey, int] = {}
        """The version of each job that its watch told of last."""
        self._nodes = NodeLabels(api)

    # Reads

    async def observe(self, namespace: str, name: str) -> Observed | None:
        """See `reconcile.Cluster`. Raises ManifestError for a PylonJob that the CRD let through and the models do
        not.
        """
        found = self._just_written((namespace, name)) or await self._read(namespace, name)
        if found is None:
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

    def is_news(self, key: JobKey, version: str) -> bool:
        """Whether this version of the job, which its watch tells of, is not the one that our last status write made.

        That one tells nothing new: the write rested on the version before it, so what others changed was seen by then.
        """
        self._heard[key] = int(version or 0)
        written = self._written.get(key)
        return written is None or written.version != version

    async def _read(self, namespace: str, name: str) -> Object | None:
        try:
            return await self._api.request("GET", PYLON_JOBS.path(namespace, name))
        except NotFound:
            self.current.pop((namespace, name), None)
            self._written.pop((namespace, name), None)
            self._heard.pop((namespace, name), None)
            return None

    def _just_written(self, key: JobKey) -> Object | None:
        """The answer to our own write, once, unless someone is known to have written since.

        If someone did whom we have not heard of yet, the next write is refused by its version, or the watch tells.
        """
        written = self._written.get(key)
        if written is None:
            return None
        answer, written.answer = written.answer, None
        overtaken = self._heard.get(key, 0) > int(written.version)
        return None if overtaken or time.monotonic() - written.time >= OWN_WRITE_SECONDS else answer

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
        answer = await patch_status(self._api, job.metadata, merge_patch(stored, status.to_wire()))
        key = (job.metadata.namespace, job.metadata.name)
        self._written[key] = Written(answer["metadata"]["resourceVersion"], answer, time.monotonic())

    async def apply(self, job: PylonJob, action: Action) -> None:
        """See `reconcile.Cluster`."""
        try:
            await self._apply(job, action)
        except NamespaceTerminating:
            now = time.monotonic()
            self._terminating = {name: until for name, until in self._terminating.items() if until > now}
            self._terminating[job.metadata.namespace] = now + TERMINATING_SECONDS
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
                *before, batch_job = build_attempt(job, attempt, default_image=self._default_image, token=token)
                refuse_lost_copies(job.spec, batch_job)
                await asyncio.gather(*(ensure(self._api, self._children, job, obj) for obj in before))
                await ensure(self._api, self._children, job, batch_job)
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
            case EmitEvent(_, reason, message):
                logger.info("%s", message, extra=_about(job) | {"reason": reason})
                self._events.post(job, action)

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
        domains = await self._nodes.domains(node, job.spec.topology.levels)
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


def _about(job: PylonJob) -> dict[str, object]:
    return {"job": f"{job.metadata.namespace}/{job.metadata.name}", "attempt": job.status.attempt}
