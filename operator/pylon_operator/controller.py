"""The loop around `reconcile`: takes due jobs, and turns whatever goes wrong into a retry that a person can follow.

It knows when to try again and what to say; what to do to a job is the plan's to decide.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime

from pylon_api.manifest import ManifestError
from pylon_operator import metrics
from pylon_operator.api import Api, Patience
from pylon_operator.api_errors import ApiError, Conflict, Forbidden
from pylon_operator.cluster import KubernetesCluster
from pylon_operator.due import DueSet
from pylon_operator.lease import LeaseLost
from pylon_operator.reconcile import reconcile
from pylon_operator.status import report_invalid
from pylon_operator.store import JobKey

logger = logging.getLogger(__name__)

RESYNC_SECONDS = 600
"""Every job is looked at this often whatever happens, so that nothing rests on one event."""
STUCK_SECONDS = 180
"""A reconcile that takes longer, or a due job that waits longer, means that the loop is stuck."""
PATIENCE = Patience(backoff_seconds=1, backoff_limit_seconds=300)
CONFLICT_PATIENCE = Patience(backoff_seconds=0.1, backoff_limit_seconds=5)
FORBIDDEN_SECONDS = 60
"""A permission comes back when a person grants it, not sooner."""


class Controller:
    """Reconciles the jobs of `due`, `workers` at a time."""

    def __init__(self, api: Api, cluster: KubernetesCluster, due: DueSet[JobKey], *, workers: int = 8) -> None:
        self._api = api
        self._cluster = cluster
        self._due = due
        self._workers = workers
        self._failures: Counter[JobKey] = Counter()

    async def run(self) -> None:
        """Work for ever. Raises LeaseLost."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._workers):
                group.create_task(self._work())

    def complaints(self) -> Iterator[str]:
        """Why the loop does not look alive, if it does not."""
        for what, seconds in (
            ("a reconcile has not come to an end", self._due.oldest_running_seconds()),
            ("a due job has not been taken up", self._due.overdue_seconds()),
        ):
            if seconds > STUCK_SECONDS:
                yield f"{what} for {seconds:.0f} s"

    def count_jobs(self) -> None:
        """Bring the gauge of jobs by phase up to date."""
        metrics.JOBS.clear()
        for phase, number in Counter(job.phase or "New" for job in self._cluster.current.values()).items():
            metrics.JOBS.labels(phase).set(number)

    async def _work(self) -> None:
        while True:
            async with self._due.take() as key:
                started = time.monotonic()
                result, after_seconds = await self._settle(key)
                metrics.RECONCILE_SECONDS.observe(time.monotonic() - started)
                metrics.RECONCILES.labels(result).inc()
                if result == "done":
                    del self._failures[key]
                if after_seconds is not None:
                    self._due.mark(key, after_seconds)

    async def _settle(self, key: JobKey) -> tuple[str, float | None]:
        """Reconcile one job: the result's name, and when to look again."""
        about = {"job": "/".join(key)}
        if (current := self._cluster.current.get(key)) is not None:
            about["attempt"] = str(current.attempt)
        try:
            after_seconds = await reconcile(self._cluster, *key, datetime.now(UTC))
        except Conflict as error:
            logger.debug("someone else wrote first, looking again: %s", error, extra=about)
            return "conflict", CONFLICT_PATIENCE.wait_seconds(self._failed(key))
        except ManifestError as error:
            return await self._report(key, error.problems)
        except Forbidden as error:
            logger.error("a permission is missing: %s", error, extra=about)
            return "forbidden", FORBIDDEN_SECONDS
        except ApiError as error:
            logger.warning("the reconcile failed and is tried again: %s", error, extra=about)
            return "error", PATIENCE.wait_seconds(self._failed(key))
        except LeaseLost:
            raise
        except Exception:
            # A bug that one job brings out must not stop the others: it is logged whole, counted and tried again.
            logger.exception("the reconcile failed unexpectedly and is tried again", extra=about)
            return "bug", PATIENCE.wait_seconds(self._failed(key))
        if after_seconds is None and key not in self._cluster.current:
            return "done", None
        resync = RESYNC_SECONDS * random.uniform(0.9, 1.1)  # noqa: S311
        return "done", min(after_seconds if after_seconds is not None else resync, resync)

    async def _report(self, key: JobKey, problems: list[str]) -> tuple[str, float | None]:
        """Say on an invalid job what is wrong with it, and leave it alone until it changes."""
        try:
            await report_invalid(self._api, *key, problems)
        except ApiError as error:
            logger.warning("an invalid job could not be told so: %s", error, extra={"job": "/".join(key)})
            return "error", PATIENCE.wait_seconds(self._failed(key))
        return "invalid", None

    def _failed(self, key: JobKey) -> int:
        self._failures[key] += 1
        return self._failures[key]
