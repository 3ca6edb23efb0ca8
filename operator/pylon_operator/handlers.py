"""The kopf side: watches PylonJobs and marks each one that moved as due. Nothing else.

No change handlers, timers, daemons or finalizers: those are edge-triggered, patch annotations onto the objects, and
block deletion while the operator is down. Peering is off, since a Lease elects; posting is off, since `events` posts.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import kopf

from pylon_api import names
from pylon_operator.api import Patience
from pylon_operator.credentials import Credentials
from pylon_operator.store import JobKey


class EndlessBackoff(Iterable[float]):
    """kopf's waits between tries: growing, and never at an end, because its watch task would take the process along."""

    def __iter__(self) -> Iterator[float]:
        patience = Patience(backoff_seconds=1, backoff_limit_seconds=30)
        return map(patience.wait_seconds, itertools.count(1))


def build_registry(mark: Callable[[JobKey], None], credentials: Credentials) -> kopf.OperatorRegistry:
    """Everything that kopf is asked to call."""
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    def log_in(**_: Any) -> kopf.ConnectionInfo:
        configuration = credentials.configuration
        scheme, token = [*(credentials.authorization() or "").split(" ", 1), "", ""][:2]
        return kopf.ConnectionInfo(
            server=credentials.server,
            ca_path=configuration.ssl_ca_cert,
            insecure=not configuration.verify_ssl,
            scheme=scheme or None,
            token=token or None,
            certificate_path=configuration.cert_file,
            private_key_path=configuration.key_file,
        )

    @kopf.on.event(names.GROUP, names.VERSION, names.PLURAL, registry=registry)
    async def job_moved(namespace: str | None, name: str, **_: Any) -> None:
        assert namespace is not None, "PylonJobs are namespaced"
        mark((namespace, name))

    return registry


def build_settings() -> kopf.OperatorSettings:
    """kopf without anything that writes to objects, and with watches that notice when they fall silent."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.peering.standalone = True
    settings.scanning.disabled = True  # neither CRDs nor namespaces need to be watched, so no permission for them
    settings.watching.chunk_size = 500
    settings.watching.server_timeout = 300
    settings.watching.inactivity_timeout = 90  # bookmarks come every 60 s
    settings.queueing.idle_timeout = 1
    settings.queueing.exit_timeout = 0.1
    settings.networking.request_timeout = 30
    settings.networking.error_backoffs = EndlessBackoff()
    settings.process.ultimate_exiting_timeout = None
    # Written by nothing above; named so that they could never collide with another operator's.
    settings.persistence.finalizer = f"{names.GROUP}/kopf"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=f"kopf.{names.GROUP}")
    settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=f"kopf.{names.GROUP}")
    return settings


async def watch_jobs(mark: Callable[[JobKey], None], credentials: Credentials, namespaces: tuple[str, ...]) -> None:
    """Watch PylonJobs in `namespaces` (none: all) until cancelled. Ends by itself only when kopf gives up.

    kopf gets a thread and an event loop of its own: when it ends, it takes every task of its loop that it did not start
    for its own and waits seconds for them, and in the main thread it would take over the signals.
    """
    loop, stop = asyncio.get_running_loop(), threading.Event()

    def mark_from_thread(key: JobKey) -> None:
        loop.call_soon_threadsafe(mark, key)

    try:
        await asyncio.to_thread(
            kopf.run,
            registry=build_registry(mark_from_thread, credentials),
            settings=build_settings(),
            standalone=True,
            clusterwide=not namespaces,
            namespaces=namespaces,
            stop_flag=stop,
        )
    finally:
        stop.set()
