"""Answers the kubelet and Prometheus: /healthz, /readyz and /metrics.

Alive means that reconciles come to an end and watches hear from the server, not that this process can answer HTTP: a
watch may fall silent while everything else looks well.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

Complaints = Callable[[], Iterable[str]]
"""What is wrong at the moment, one line each; empty when all is well."""
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serve_probes(
    *,
    health_port: int,
    metrics_port: int,
    alive: Complaints,
    ready: Complaints,
    refresh: Callable[[], None],
    host: str = "0.0.0.0",  # noqa: S104  the kubelet and Prometheus come from outside of the pod
) -> AsyncIterator[None]:
    """Serve for the length of the block; equal ports share one server, port 0 switches one off.

    `refresh` is called before each scrape. Raises OSError when a port is in use.
    """
    health = [web.get("/healthz", _answer(alive)), web.get("/readyz", _answer(ready))]
    scrape = [web.get("/metrics", _scrape(refresh))]
    ports: dict[int, list[web.RouteDef]] = {}
    for port, routes in ((health_port, health), (metrics_port, scrape)):
        if port:
            ports.setdefault(port, []).extend(routes)
    runners = []
    try:
        for port, routes in ports.items():
            app = web.Application()
            app.add_routes(routes)
            runner = web.AppRunner(app, access_log=None)
            runners.append(runner)
            await runner.setup()
            await web.TCPSite(runner, host, port).start()
        yield
    finally:
        for runner in runners:
            await runner.cleanup()


def _answer(complaints: Complaints) -> Handler:
    async def answer(_: web.Request) -> web.Response:
        found = list(complaints())
        return web.Response(status=503 if found else 200, text="\n".join(found) or "ok")

    return answer


def _scrape(refresh: Callable[[], None]) -> Handler:
    async def scrape(_: web.Request) -> web.Response:
        refresh()
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return scrape
