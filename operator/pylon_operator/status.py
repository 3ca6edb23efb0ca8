"""Writes the status of a PylonJob, and says on one that cannot be parsed what is wrong with it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pylon_api import names
from pylon_api.job import ConditionStatus, ObjectMeta
from pylon_api.names import ConditionType, Reason
from pylon_operator.api import MERGE_PATCH, Api
from pylon_operator.api_errors import NotFound
from pylon_operator.kinds import PYLON_JOBS

Object = dict[str, Any]


async def patch_status(api: Api, metadata: ObjectMeta, patch: Object) -> None:
    """Merge `patch` into the status of the PylonJob that still has this resource version, else raise Conflict."""
    await api.request(
        "PATCH",
        PYLON_JOBS.path(metadata.namespace, metadata.name, "status"),
        query={"fieldManager": names.FIELD_MANAGER},
        body={"metadata": {"resourceVersion": metadata.resource_version}, "status": patch},
        content_type=MERGE_PATCH,
    )


async def report_invalid(api: Api, namespace: str, name: str, problems: list[str]) -> None:
    """Show on a PylonJob that cannot be parsed what is wrong with it: condition Succeeded, unless it says so
    already.
    """
    try:
        found = await api.request("GET", PYLON_JOBS.path(namespace, name))
    except NotFound:
        return
    metadata = ObjectMeta.model_validate(found["metadata"])
    conditions = (found.get("status") or {}).get("conditions") or []
    told = with_invalid(conditions, "; ".join(problems), metadata.generation, datetime.now(UTC))
    if told != conditions:
        await patch_status(api, metadata, {"conditions": told, "observedGeneration": metadata.generation})


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
