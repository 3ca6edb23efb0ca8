"""Brings the objects of an attempt into being without ever taking what belongs to someone else."""

from __future__ import annotations

from typing import Any

from pylon_api import names
from pylon_api.job import PylonJob
from pylon_api.names import Reason
from pylon_operator.api import APPLY_PATCH, Api, Resource
from pylon_operator.api_errors import AlreadyExists, Conflict
from pylon_operator.children import Children
from pylon_operator.errors import Refused
from pylon_operator.kinds import BY_KIND

Object = dict[str, Any]

REPAIRABLE: dict[str, tuple[str, ...]] = {
    "Service": ("selector", "ports", "publishNotReadyAddresses"),
    "Job": ("parallelism", "completions", "backoffLimit"),
}
"""Fields of spec that others can change and that are put back. Everything else is immutable, or not ours (Kueue's
suspend).
"""


async def ensure(api: Api, children: Children, job: PylonJob, obj: Object) -> None:
    """Create `obj`, or put right what is already there and ours.

    Created by POST, which fails where the name is taken: a server-side apply would merge into a stranger's object,
    and with our owner reference on it the garbage collector would take it.
    """
    resource = BY_KIND[obj["kind"]]
    namespace, name = obj["metadata"]["namespace"], obj["metadata"]["name"]
    store = children.by_resource.get(resource)
    if store is None or name not in store.of(job.metadata.uid):
        try:
            query = {"fieldManager": names.FIELD_MANAGER}
            created = await api.request("POST", resource.path(namespace), query=query, body=obj)
            if store is not None:
                store.written(created)
            return
        except AlreadyExists:
            if store is None:  # the Secret: its name holds the uid of the job, and it may not be read
                return
            found = await api.request("GET", resource.path(namespace, name))
            _check_owner(job, found)
            store.written(found)
    if obj["kind"] in REPAIRABLE:
        assert store is not None
        store.written(await _repair(api, resource, obj))


async def _repair(api: Api, resource: Resource, obj: Object) -> Object:
    metadata = {key: obj["metadata"][key] for key in ("name", "namespace", "labels", "ownerReferences")}
    spec = {key: obj["spec"][key] for key in REPAIRABLE[obj["kind"]]}
    return await api.request(
        "PATCH",
        resource.path(metadata["namespace"], metadata["name"]),
        query={"fieldManager": names.FIELD_MANAGER, "force": "true"},
        body={"apiVersion": obj["apiVersion"], "kind": obj["kind"], "metadata": metadata, "spec": spec},
        content_type=APPLY_PATCH,
    )


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
