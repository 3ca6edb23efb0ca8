"""Lists and watches one resource for ever, in chunks, and tells a store what it sees.

It survives what watches meet: a version too old (410: list again), a lost connection (go on from the last version),
and a stream that falls silent without closing (bookmarks come every minute, so silence is an answer). It decides
nothing.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import Any, NoReturn

from pylon_api import names
from pylon_operator import metrics
from pylon_operator.api import JSON, METADATA_ONLY, METADATA_ONLY_WATCH, Api, Patience, Resource
from pylon_operator.api_errors import ApiError, Forbidden, Gone, error_of_status
from pylon_operator.store import Store

logger = logging.getLogger(__name__)

SELECTOR = f"{names.LABEL_APP}={names.APP}"
CHUNK = 500
"""Objects per page of a list: 500 full pods are a few MB at a time."""


class Watch:
    """One resource in one namespace (None: all).

    `silence_seconds`: a stream without a byte for so long is dead; must exceed the minute between two bookmarks.
    """

    def __init__(
        self,
        api: Api,
        resource: Resource,
        store: Store[Any],
        *,
        namespace: str | None = None,
        metadata_only: bool = False,
        silence_seconds: float = 90,
        backoff: Patience | None = None,
    ) -> None:
        self._api = api
        self._resource = resource
        self._store = store
        self._namespace = namespace
        self._accept = (METADATA_ONLY, METADATA_ONLY_WATCH) if metadata_only else (JSON, JSON)
        self._silence_seconds = silence_seconds
        self._backoff = backoff or Patience(backoff_seconds=0.5, backoff_limit_seconds=30)
        self._heard = time.monotonic()
        self.synced = asyncio.Event()
        """Set once the first list is in the store."""

    @property
    def age_seconds(self) -> float:
        """Time since the server last said anything on this watch."""
        return time.monotonic() - self._heard

    @property
    def name(self) -> str:
        """Plural of the resource, for logs and metrics."""
        return self._resource.plural

    async def run(self) -> NoReturn:
        """List, then watch, then again, with growing waits while it fails. Ends only when cancelled."""
        version, failures = None, 0
        while True:
            try:
                if version is None:
                    version = await self._list()
                    self.synced.set()
                async for event in self._events(version):
                    version, failures = self._take(event), 0
            except Gone:
                version, cause = None, "gone"
            except ApiError as error:
                failures, cause = failures + 1, type(error).__name__
                level = logging.ERROR if isinstance(error, Forbidden) else logging.WARNING
                logger.log(level, "watch of %s broke off, trying again: %s", self.name, error)
            else:
                cause = "ended"
            metrics.WATCH_RESTARTS.labels(self.name, cause).inc()
            await asyncio.sleep(self._backoff.wait_seconds(max(failures, 1)))

    async def _list(self) -> str:
        """Put every object into the store, page by page; the version to watch from."""
        listed: set[tuple[str, str]] = set()
        query = {"labelSelector": SELECTOR, "limit": str(CHUNK)}
        path = self._resource.path(self._namespace)
        while True:
            page = await self._api.request("GET", path, query=query, accept=self._accept[0])
            self._heard = time.monotonic()
            for obj in page.get("items") or []:
                self._store.observe(obj)
                listed.add((obj["metadata"]["namespace"], obj["metadata"]["name"]))
            token = page["metadata"].get("continue")
            if not token:
                version = str(page["metadata"]["resourceVersion"])
                self._store.keep_only(listed, self._namespace, version)
                return version
            query["continue"] = token

    def _events(self, version: str) -> Any:
        query = {
            "watch": "1",
            "labelSelector": SELECTOR,
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            # Spread, so that the watches of many operators do not all return at once.
            "timeoutSeconds": str(random.randint(240, 360)),  # noqa: S311
        }
        return self._api.stream(
            self._resource.path(self._namespace),
            query=query,
            accept=self._accept[1],
            silence_seconds=self._silence_seconds,
        )

    def _take(self, event: dict[str, Any]) -> str:
        self._heard = time.monotonic()
        kind, obj = event["type"], event["object"]
        if kind == "ERROR":
            raise error_of_status("WATCH", self._resource.path(self._namespace), obj.get("code") or 0, obj)
        if kind == "DELETED":
            self._store.remove(obj)
        elif kind != "BOOKMARK":
            self._store.observe(obj)
        return str(obj["metadata"]["resourceVersion"])
