"""The operator as a process: checks, probes, lease, then watches and workers until it is told to stop.

Nothing of a job is decided here; this is the one place where the parts are put together.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import socket
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from pylon_operator import metrics
from pylon_operator.api import Api
from pylon_operator.api_errors import ApiError
from pylon_operator.children import Children
from pylon_operator.cluster import KubernetesCluster
from pylon_operator.controller import Controller
from pylon_operator.credentials import CredentialsError, load_credentials
from pylon_operator.due import DueSet
from pylon_operator.events import EventPoster
from pylon_operator.handlers import watch_jobs
from pylon_operator.kinds import CONFIG_MAPS, SERVICES
from pylon_operator.lease import Lease, LeaseLost
from pylon_operator.poll import Poller
from pylon_operator.preflight import PreflightError, check_cluster
from pylon_operator.probes import serve_probes
from pylon_operator.store import JobKey
from pylon_operator.token_key import TokenKeyError, ensure_token_key, read_token_key
from pylon_operator.watch import Watch

logger = logging.getLogger(__name__)

STALE_WATCH_SECONDS = 600
"""A watch that heard nothing for so long will not mend itself: bookmarks come every minute."""
EVENT_POSTERS = 4
"""Events that are on their way at a time."""
CHILD_DELAY_SECONDS = 0.1
"""Pods of a gang move together; waiting a moment after one moved makes one reconcile of many."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says. `namespaces` empty: all; a port of 0: not served."""

    kubeconfig: Path | None
    namespaces: tuple[str, ...]
    image: str
    health_port: int
    metrics_port: int
    own_namespace: str
    use_lease: bool
    poll_seconds: float
    token_key_file: Path | None


class WatchEnded(Exception):
    """kopf gave up, which it says itself in the log."""


class _Stop(Exception):
    """SIGTERM or SIGINT."""


EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (LeaseLost, 75),
    (WatchEnded, 70),
    (CredentialsError, 78),
    (TokenKeyError, 78),
    (ApiError, 69),
    (OSError, 78),  # a port in use
    (_Stop, 0),
)
"""After sysexits(3), worst first; a failed preflight brings its own."""


async def serve(options: Options) -> int:
    """Run until told to stop. The exit code; what is foreseen is one line in the log, anything else is raised."""
    try:
        await _Operator(options).run()
    except (ExceptionGroup, CredentialsError) as failure:
        for error, code in _foreseen(failure):
            if code:
                logger.error("%s", error, extra={"exit_code": code})
            return code
        raise
    return 0


def _foreseen(failure: Exception) -> Iterator[tuple[Exception, int]]:
    """Every error in `failure` that has an exit code, worst first."""
    errors = list(_leaves(failure))
    for error in errors:
        if isinstance(error, PreflightError):
            yield error, error.exit_code
    for kind, code in EXIT_CODES:
        yield from ((error, code) for error in errors if isinstance(error, kind))


def _leaves(error: Exception) -> Iterator[Exception]:
    if isinstance(error, ExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


class _Operator:
    def __init__(self, options: Options) -> None:
        self._options = options
        self._identity = f"{socket.gethostname()}_{secrets.token_hex(4)}"
        self._due: DueSet[JobKey] = DueSet()
        self._watches: list[Watch] = []
        self._controller: Controller | None = None
        self._namespaces: tuple[str | None, ...] = options.namespaces or (None,)
        self._checked = False

    async def run(self) -> None:
        """Everything until SIGTERM. What tasks use is entered before the group of tasks, so that it outlives them."""
        options = self._options
        credentials = load_credentials(options.kubeconfig)
        async with AsyncExitStack() as stack:
            api = await stack.enter_async_context(Api(credentials))
            poller = await stack.enter_async_context(Poller(self._due.mark, poll_seconds=options.poll_seconds))
            await stack.enter_async_context(
                serve_probes(
                    health_port=options.health_port,
                    metrics_port=options.metrics_port,
                    alive=self._alive,
                    ready=self._ready,
                    refresh=self._refresh_metrics,
                )
            )
            lease = Lease(api, options.own_namespace, self._identity)
            stack.push_async_callback(lease.release)
            async with asyncio.TaskGroup() as group:
                _stop_on_signals(group)
                await check_cluster(api, namespaces=self._namespaces, own_namespace=options.own_namespace)
                self._checked = True
                if options.use_lease:
                    await lease.acquire()
                    api.fence = lease.check
                    group.create_task(lease.keep())
                cluster = await self._start(api, poller, group)

                def moved(job: JobKey, version: str) -> None:
                    if cluster.is_news(job, version):
                        self._due.mark(job)

                await watch_jobs(moved, credentials, options.namespaces)
                raise WatchEnded("the watch of PylonJobs ended by itself")

    async def _start(self, api: Api, poller: Poller, group: asyncio.TaskGroup) -> KubernetesCluster:
        """Start all that works on jobs; the workers only when the first lists are in."""
        options = self._options
        file = options.token_key_file
        key = read_token_key(file) if file else await ensure_token_key(api, options.own_namespace)
        children = Children(lambda job: self._due.mark(job, CHILD_DELAY_SECONDS))
        events = EventPoster(api, self._identity)
        cluster = KubernetesCluster(api, children, poller, events, default_image=options.image, token_key=key)
        self._watches = [
            Watch(api, resource, store, namespace=namespace, metadata_only=resource in (SERVICES, CONFIG_MAPS))
            for resource, store in children.by_resource.items()
            for namespace in self._namespaces
        ]
        for watch in self._watches:
            group.create_task(watch.run())
        for watch in self._watches:
            await watch.synced.wait()
        self._controller = Controller(api, cluster, self._due)
        group.create_task(self._controller.run())
        for _ in range(EVENT_POSTERS):
            group.create_task(events.run())
        group.create_task(poller.run(cluster.targets))
        logger.info("working", extra={"namespaces": ",".join(options.namespaces) or "all"})
        return cluster

    def _alive(self) -> Iterator[str]:
        for watch in self._watches:
            if watch.age_seconds > STALE_WATCH_SECONDS:
                yield f"the watch of {watch.name} has heard nothing for {watch.age_seconds:.0f} s"
        if self._controller is not None:
            yield from self._controller.complaints()

    def _ready(self) -> Iterator[str]:
        """One that waits for the lease is ready too: it would stand in the way of its own roll-out otherwise."""
        if not self._checked:
            yield "the API server, the permissions and the CRD are still being checked"
        for watch in self._watches:
            if not watch.synced.is_set():
                yield f"the first list of {watch.name} is not in yet"

    def _refresh_metrics(self) -> None:
        for watch in self._watches:
            metrics.WATCH_AGE.labels(watch.name).set(watch.age_seconds)
        if self._controller is not None:
            self._controller.count_jobs()


def _stop_on_signals(group: asyncio.TaskGroup) -> None:
    """Make SIGTERM and SIGINT end the group."""
    stopped = asyncio.Event()

    async def end() -> None:
        await stopped.wait()
        raise _Stop

    group.create_task(end())
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)


def default_namespace() -> str:
    """The namespace of this pod: POD_NAMESPACE, else the service account's, else `default`."""
    file = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
    return os.environ.get("POD_NAMESPACE") or (file.read_text().strip() if file.exists() else "default")
