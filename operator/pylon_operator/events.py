"""Posts Kubernetes Events in the background: best effort, never in the way of a reconcile."""

from __future__ import annotations

import asyncio
import logging
import secrets
from datetime import UTC, datetime
from typing import Any, NoReturn

from pylon_api import names
from pylon_api.job import PylonJob
from pylon_operator.api import Api
from pylon_operator.api_errors import ApiError
from pylon_operator.kinds import EVENTS
from pylon_operator.observation import EmitEvent

logger = logging.getLogger(__name__)

NOTE_LIMIT = 1024
"""Characters of a note that events.k8s.io/v1 accepts."""


class EventPoster:
    """A bounded queue of Events; what does not fit is dropped, as the API server itself forgets them after an hour."""

    def __init__(self, api: Api, instance: str, *, limit: int = 1000) -> None:
        self._api = api
        self._instance = instance
        self._waiting: asyncio.Queue[dict[str, Any]] = asyncio.Queue(limit)

    def post(self, job: PylonJob, event: EmitEvent) -> None:
        """Queue one Event about `job`. Raises nothing."""
        try:
            self._waiting.put_nowait(self._object(job, event))
        except asyncio.QueueFull:
            logger.warning("too many events, one was dropped", extra={"job": job.metadata.name, "reason": event.reason})

    async def run(self) -> NoReturn:
        """Post what is queued, for ever."""
        while True:
            event = await self._waiting.get()
            try:
                await self._api.request("POST", EVENTS.path(event["metadata"]["namespace"]), body=event)
            except ApiError as error:
                logger.warning("an event was not posted: %s", error)

    def _object(self, job: PylonJob, event: EmitEvent) -> dict[str, Any]:
        regarding = {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "name": job.metadata.name,
            "namespace": job.metadata.namespace,
            "uid": job.metadata.uid,
        }
        return {
            "apiVersion": EVENTS.api_version,
            "kind": EVENTS.kind,
            "metadata": {"name": f"{job.metadata.name}.{secrets.token_hex(8)}", "namespace": job.metadata.namespace},
            "eventTime": datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "reportingController": names.MANAGED_BY,
            "reportingInstance": self._instance,
            "action": "Reconcile",
            "type": event.type,
            "reason": event.reason,
            "note": event.message[:NOTE_LIMIT],
            "regarding": regarding,
        }
