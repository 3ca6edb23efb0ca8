"""Elects one operator of several by a Lease, and ends the process that has lost it.

The Lease only chooses who works; it fences nothing, since a paused process does not know that its time is up. What
keeps a second gang from starting is the order of writes (see `observation.Decision`). `check` narrows the gap: it
refuses writes from the moment at which another process may have taken over, by this process's own clock.
"""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime
from typing import Any, NoReturn

from pylon_operator import metrics
from pylon_operator.api import Api
from pylon_operator.api_errors import AlreadyExists, ApiError, Conflict, NotFound
from pylon_operator.kinds import LEASES
from pylon_operator.permissions import LEASE

logger = logging.getLogger(__name__)


RELEASE_SECONDS = 5
"""Patience for giving the lease back."""


class LeaseLost(Exception):
    """Another process may be the leader by now: stop at once."""


class Lease:
    """One candidate for the Lease `LEASE` of `namespace`. All times in seconds.

    Others may take over once they have seen the record unchanged for `duration_seconds`; the holder itself gives up
    after `renew_deadline_seconds` without a renewal, which must be less.
    """

    def __init__(
        self,
        api: Api,
        namespace: str,
        identity: str,
        *,
        duration_seconds: int = 15,
        renew_deadline_seconds: float = 10,
        retry_seconds: float = 2,
    ) -> None:
        self._api = api
        self._collection = LEASES.path(namespace)
        self._path = LEASES.path(namespace, LEASE)
        self._namespace = namespace
        self._identity = identity
        self._duration_seconds = duration_seconds
        self._renew_deadline_seconds = renew_deadline_seconds
        self._retry_seconds = retry_seconds
        self._renewed = float("-inf")
        self._seen: tuple[str, float] = ("", 0.0)
        """Another holder's record (its resource version) and when this process first saw it."""

    def check(self) -> None:
        """Raises LeaseLost unless this process surely still is the leader."""
        if time.monotonic() - self._renewed > self._renew_deadline_seconds:
            raise LeaseLost(f"the lease was not renewed for {self._renew_deadline_seconds} s")

    async def acquire(self) -> None:
        """Wait until this process is the leader. Raises Forbidden when Leases may not be used at all."""
        while not await self._try():  # noqa: ASYNC110  the event is on the API server
            await asyncio.sleep(self._retry_seconds)
        metrics.LEADER.set(1)
        logger.info("leading", extra={"identity": self._identity})

    async def keep(self) -> NoReturn:
        """Renew for ever. Raises LeaseLost when someone else holds it or the deadline for renewing passed."""
        while True:
            await asyncio.sleep(self._retry_seconds)
            left = self._renewed + self._renew_deadline_seconds - time.monotonic()
            try:
                if not await asyncio.wait_for(self._try(), max(left, 0)):
                    raise LeaseLost("another operator holds the lease")
            except (ApiError, TimeoutError) as error:
                logger.warning("the lease could not be renewed: %s", _reason(error))
                self.check()

    async def release(self) -> None:
        """Let another process take over at once, if this one still leads; a failure costs the others the lease's
        duration.

        Bounded in time, because it is the last thing that a process does.
        """
        try:
            self.check()
        except LeaseLost:
            return
        self._renewed = float("-inf")
        metrics.LEADER.set(0)
        try:
            async with asyncio.timeout(RELEASE_SECONDS):
                record = await self._api.request("GET", self._path, fenced=False)
                if record["spec"].get("holderIdentity") == self._identity:
                    record["spec"] = self._spec() | {"holderIdentity": "", "leaseDurationSeconds": 1}
                    await self._api.request("PUT", self._path, body=record, fenced=False)
        except (ApiError, TimeoutError) as error:
            logger.warning("the lease could not be released: %s", _reason(error))

    async def _try(self) -> bool:
        """One try to take or renew the lease; whether this process holds it now.

        The holder's time counts from before the request, so that a slow answer never makes it longer than others think.
        """
        now = time.monotonic()
        try:
            record = await self._api.request("GET", self._path, fenced=False)
            if not self._free(record, now):
                return False
            record["spec"] = record["spec"] | self._spec()
            await self._api.request("PUT", self._path, body=record, fenced=False)
        except NotFound:
            record = {
                "apiVersion": LEASES.api_version,
                "kind": LEASES.kind,
                "metadata": {"name": LEASE, "namespace": self._namespace},
                "spec": self._spec(),
            }
            try:
                await self._api.request("POST", self._collection, body=record, fenced=False)
            except AlreadyExists:
                return False
        except Conflict:
            return False
        self._renewed = now
        return True

    def _free(self, record: dict[str, Any], now: float) -> bool:
        """Ours, given up, or unchanged for its whole duration by our own clock: clocks of two machines may differ."""
        spec = record["spec"]
        if spec.get("holderIdentity") in (self._identity, "", None):
            return True
        version = record["metadata"]["resourceVersion"]
        if self._seen[0] != version:
            self._seen = (version, now)
        return now - self._seen[1] > (spec.get("leaseDurationSeconds") or self._duration_seconds)

    def _spec(self) -> dict[str, Any]:
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": self._duration_seconds,
            "renewTime": datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
        }


def _reason(error: Exception) -> str:
    return str(error) or "no answer in time"
