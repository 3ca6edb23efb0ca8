"""Answers the kubelet and Prometheus: /healthz, /readyz and /metrics.

Alive means that reconciles come to an end and watches hear from the server, not that this process can answer HTTP: a
watch may fall silent while everything else looks well.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

Complaints = Callable[[], Iterable[str]]
"""What is wrong at the moment, one line each; empty when all is well."""


@asynccontextmanager
async def serve_probes(
    *,
    health_port: int,
    metrics_port: int,
    alive: Complaints,
    ready: Complaints,
    host: str = "0.0.0.0",  # noqa: S104
) -> AsyncIterator[None]:
    """Serve for the length of the block; equal ports share one server, port 0 switches one off.

    Raises OSError when a port is in use.
    """
    health = [web.get("/healthz", _answer(alive)), web.get("/readyz", _answer(ready))]
    scrape = [web.get("/metrics", _scrape)]
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


def _answer(complaints: Complaints) -> Callable[[web.Request], object]:
    async def answer(request: web.Request) -> web.Response:
        found = list(complaints())
        return web.Response(status=503 if found else 200, text="\n".join(found) or "ok")

    return answer


async def _scrape(request: web.Request) -> web.Response:
    return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})
