"""A small API server in this process: enough of Kubernetes' protocol to test a client against what real ones rarely do.

It keeps objects, versions and a history to watch from, and does on demand what is hard to get from a real one: refuse,
fall silent, forget its history, drop connections. It validates nothing; tests/cluster has the real thing for that.
"""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from pylon_operator.api import Patience
from pylon_operator.credentials import Credentials, load_credentials

Object = dict[str, Any]
Place = tuple[str, str, str]
"""Plural, namespace, name."""

PATH = re.compile(
    r"^/(?:api/v1|apis/[^/]+/[^/]+)(?:/namespaces/(?P<namespace>[^/]+))?/(?P<plural>[^/]+)"
    r"(?:/(?P<name>[^/]+)(?:/(?P<subresource>[^/]+))?)?$"
)
HASTY = Patience(timeout_seconds=5, tries=4, backoff_seconds=0.001, backoff_limit_seconds=0.01)
"""Retries that a test need not wait for."""


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Any


@dataclass
class FakeApiServer:
    url: str = ""
    requests: list[Request] = field(default_factory=list)
    objects: dict[Place, Object] = field(default_factory=dict)
    version: int = 100
    oldest: int = 0
    """Versions up to this one are forgotten: watching from them is answered with 410."""
    silent: bool = False
    """Watches send nothing, and do not end."""
    _history: list[tuple[int, str, str, Object]] = field(default_factory=list)
    _faults: list[tuple[str, str, Callable[[], web.Response]]] = field(default_factory=list)
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)
    streams: list[web.Request] = field(default_factory=list)
    """Watches that are open at the moment."""

    # What a test does to it

    def put(self, plural: str, obj: Object) -> Object:
        """Create or replace an object, as someone else would."""
        metadata = obj.setdefault("metadata", {})
        place = (plural, metadata.get("namespace", ""), metadata["name"])
        self.version += 1
        old = self.objects.get(place)
        metadata.setdefault("uid", old["metadata"]["uid"] if old else str(uuid.uuid4()))
        metadata["resourceVersion"] = str(self.version)
        self.objects[place] = obj
        self._tell(plural, "MODIFIED" if old else "ADDED", obj)
        return obj

    def remove(self, plural: str, namespace: str, name: str) -> Object:
        self.version += 1
        obj = self.objects.pop((plural, namespace, name))
        obj["metadata"]["resourceVersion"] = str(self.version)
        self._tell(plural, "DELETED", obj)
        return obj

    def forget_history(self) -> None:
        self.oldest = self.version
        self._history.clear()

    def break_streams(self) -> None:
        """Cut every open watch, in the middle of whatever it is doing."""
        for request in self.streams:
            if request.transport:
                request.transport.abort()

    def refuse(
        self,
        method: str,
        path: str,
        status: int,
        reason: str = "",
        message: str = "no",
        headers: dict[str, str] | None = None,
        causes: list[Object] | None = None,
        times: int = 1,
    ) -> None:
        """Answer the next `times` requests of this method whose path ends in `path` with an error."""
        answer = lambda: _status(status, reason, message, headers, causes)  # noqa: E731
        self._faults += [(method, path, answer)] * times

    def sent(self, method: str, ending: str = "") -> list[Request]:
        return [r for r in self.requests if r.method == method and r.path.endswith(ending)]

    # The protocol

    async def handle(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        body = json.loads(raw) if raw else None
        record = Request(request.method, request.path, dict(request.query), dict(request.headers), body)
        self.requests.append(record)
        for fault in self._faults:
            if fault[0] == request.method and request.path.endswith(fault[1]):
                self._faults.remove(fault)
                return fault[2]()
        if (found := PATH.match(request.path)) is None:
            return _status(404, "NotFound", "the server could not find the requested resource")
        plural, namespace, name = found["plural"], found["namespace"] or "", found["name"]
        if name is None and request.method == "GET":
            return await (self._watch if "watch" in request.query else self._list)(request, plural, namespace)
        if request.method == "POST":
            return self._create(plural, namespace, body)
        place = (plural, namespace, name)
        if place not in self.objects:
            return _status(404, "NotFound", f"{plural} {name!r} not found")
        return {"GET": self._get, "PATCH": self._patch, "PUT": self._replace, "DELETE": self._delete}[request.method](
            place, body
        )

    def _create(self, plural: str, namespace: str, body: Object) -> web.Response:
        if (plural, namespace, body["metadata"]["name"]) in self.objects:
            return _status(409, "AlreadyExists", f"{plural} {body['metadata']['name']!r} already exists")
        body["metadata"].setdefault("namespace", namespace)
        return web.json_response(self.put(plural, body), status=201)

    def _get(self, place: Place, body: Any) -> web.Response:
        return web.json_response(self.objects[place])

    def _patch(self, place: Place, body: Object) -> web.Response:
        if (conflict := self._conflict(place, body.get("metadata") or {})) is not None:
            return conflict
        changed = merged(self.objects[place], {k: v for k, v in body.items() if k not in ("apiVersion", "kind")})
        return web.json_response(self.put(place[0], changed))

    def _replace(self, place: Place, body: Object) -> web.Response:
        if (conflict := self._conflict(place, body["metadata"])) is not None:
            return conflict
        return web.json_response(self.put(place[0], body))

    def _delete(self, place: Place, body: Object | None) -> web.Response:
        if (conflict := self._conflict(place, (body or {}).get("preconditions") or {})) is not None:
            return conflict
        self.remove(*place)
        return web.json_response({"kind": "Status", "status": "Success"})

    def _conflict(self, place: Place, wanted: Object) -> web.Response | None:
        held = self.objects[place]["metadata"]
        for precondition in ("uid", "resourceVersion"):
            if wanted.get(precondition) not in (None, held[precondition]):
                return _status(409, "Conflict", f"{precondition} is {held[precondition]}")
        return None

    async def _list(self, request: web.Request, plural: str, namespace: str) -> web.Response:
        items = [o for (p, n, _), o in sorted(self.objects.items()) if p == plural and namespace in ("", n)]
        start, limit = int(request.query.get("continue", 0)), int(request.query.get("limit", len(items) or 1))
        metadata = {"resourceVersion": str(self.version)}
        if start + limit < len(items):
            metadata["continue"] = str(start + limit)
        return web.json_response({"items": items[start : start + limit], "metadata": metadata})

    async def _watch(self, request: web.Request, plural: str, namespace: str) -> web.StreamResponse:
        version = int(request.query["resourceVersion"])
        if version < self.oldest:
            return _status(410, "Expired", "too old resource version")
        stream = web.StreamResponse()
        await stream.prepare(request)
        self.streams.append(request)
        try:
            while True:
                for seen, kind, change, obj in [] if self.silent else list(self._history):
                    if seen > version and kind == plural and namespace in ("", obj["metadata"].get("namespace", "")):
                        version = seen
                        await stream.write(json.dumps({"type": change, "object": obj}).encode() + b"\n")
                async with self._news:
                    await self._news.wait()
        except ConnectionError:
            return stream
        finally:
            self.streams.remove(request)

    def _tell(self, plural: str, change: str, obj: Object) -> None:
        self._history.append((self.version, plural, change, deepcopy(obj)))
        asyncio.get_running_loop().create_task(self._wake())

    async def _wake(self) -> None:
        async with self._news:
            self._news.notify_all()


@asynccontextmanager
async def fake_api_server() -> AsyncIterator[FakeApiServer]:
    """A running server on a free port of loopback."""
    server = FakeApiServer()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    server.url = f"http://{host}:{port}"
    try:
        yield server
    finally:
        server.break_streams()
        await runner.cleanup()


def credentials_for(url: str, directory: Path, token: str = "t0ken") -> Credentials:
    """Credentials as a kubeconfig gives them."""
    path = directory / "kubeconfig"
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": url}}],
        "users": [{"name": "u", "user": {"token": token}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    }
    path.write_text(json.dumps(config))
    return load_credentials(path)


def merged(target: Any, patch: Any) -> Any:
    """What a JSON merge patch makes of its target (RFC 7396, section 2)."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


def _status(
    code: int,
    reason: str,
    message: str,
    headers: dict[str, str] | None = None,
    causes: list[Object] | None = None,
) -> web.Response:
    body = {"kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": message}
    if causes:
        body["details"] = {"causes": causes}
    return web.json_response(body, status=code, headers=headers)
