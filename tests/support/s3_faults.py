"""An HTTP proxy in front of an S3 server that spoils what it is told to: a store on a bad day.

A fault says which requests it spoils and how often. Whatever has no fault passes unchanged.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web

_HOP_HEADERS = {"transfer-encoding", "connection", "content-length", "keep-alive"}


@dataclass
class Fault:
    """Spoils the next `times` requests of a method whose path and query hold some text."""

    method: str = "PUT"
    holds: str = ""
    times: int = 1

    def fits(self, request: web.Request) -> bool:
        return self.times > 0 and request.method == self.method and self.holds in request.path_qs


@dataclass
class Refuse(Fault):
    """Answered with an error that never reaches the server."""

    status: int = 503
    code: str = "SlowDown"
    message: str = "Please reduce your request rate."


@dataclass
class CutRequest(Fault):
    """The connection breaks while the body is on its way."""


@dataclass
class CutAnswer(Fault):
    """The server does what it was asked to; the connection breaks in the middle of the answer's body, or before the
    answer when it has none worth cutting."""


@dataclass
class Shorten(Fault):
    """The answer has less than it should, and a length that says so too."""


@dataclass
class Flip(Fault):
    """One bit of the answer is not as the server sent it."""

    method: str = "GET"


@dataclass
class Misstate(Fault):
    """The answer to HEAD names a wrong length."""


@dataclass
class HoldBack(Fault):
    """Waits until another request, one that holds some text, was answered."""

    until: str = ""


@dataclass
class Hide(Fault):
    """Listings leave out keys that hold some text."""

    method: str = "GET"
    key: str = ""


@dataclass
class FaultyStore:
    """The proxy. Faults may be set at any time."""

    url: str = ""
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    """Each as "PUT /bucket/key?query", in the order in which they came."""
    answered: list[str] = field(default_factory=list)
    connections: list[object] = field(default_factory=list)
    """That by which each of the requests came."""

    def reset(self) -> None:
        self.faults.clear()
        self.requests.clear()
        self.answered.clear()
        self.connections.clear()

    def count(self, method: str, holds: str = "") -> int:
        """How many requests of a method came whose path and query hold some text."""
        return sum(line.startswith(f"{method} ") and holds in line for line in self.requests)

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        line = f"{request.method} {request.path_qs}"
        self.requests.append(line)
        self.connections.append(request.transport)
        fault = next((fault for fault in self.faults if fault.fits(request)), None)
        if fault is not None:
            fault.times -= 1
        if isinstance(fault, CutRequest):
            await request.content.read(10)
            return _break(request)
        body = await request.read()
        if isinstance(fault, Refuse):
            text = f"<Error><Code>{fault.code}</Code><Message>{fault.message}</Message></Error>"
            return web.Response(status=fault.status, body=text.encode(), content_type="application/xml")
        if isinstance(fault, HoldBack):
            while not any(fault.until in line for line in self.answered):
                await asyncio.sleep(0.01)
        async with self._session.request(
            request.method, self._server + request.path_qs, headers=request.headers, data=body, skip_auto_headers=["*"]
        ) as answer:
            content = await answer.read()
            headers = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP_HEADERS}
        self.answered.append(line)
        if isinstance(fault, CutAnswer):
            if request.method != "GET":
                return _break(request)
            response = web.StreamResponse(status=answer.status, headers=headers)
            response.content_length = len(content)
            await response.prepare(request)
            await response.write(content[: len(content) // 2])
            return _break(request)
        if isinstance(fault, Hide):
            listed = rf"<(Contents|CommonPrefixes)>(?:(?!</\1>).)*{re.escape(fault.key)}(?:(?!</\1>).)*</\1>"
            content = re.sub(listed.encode(), b"", content, flags=re.DOTALL)
        if isinstance(fault, Shorten):
            content = content[:-5]
        if isinstance(fault, Flip):
            content = content[:-1] + bytes([content[-1] ^ 1])
        if request.method == "HEAD":
            length = int(answer.headers.get("content-length", 0)) + (1 if isinstance(fault, Misstate) else 0)
            return web.Response(status=answer.status, headers={**headers, "content-length": str(length)})
        return web.Response(status=answer.status, body=content, headers=headers)

    async def _serve(self, server: str, ready: threading.Event, end: asyncio.Event) -> None:
        self._server = server
        application = web.Application(client_max_size=2**30)
        application.router.add_route("*", "/{path:.*}", self._pass)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        async with aiohttp.ClientSession(auto_decompress=False) as self._session:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            ready.set()
            await end.wait()
            await runner.cleanup()


def _break(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


@contextmanager
def spoil(server: str) -> Iterator[FaultyStore]:
    """A proxy in front of the server with this URL."""
    store = FaultyStore()
    loop = asyncio.new_event_loop()
    ready, end = threading.Event(), asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=[store._serve(server, ready, end)])
    thread.start()
    assert ready.wait(10)
    yield store
    loop.call_soon_threadsafe(end.set)
    thread.join()
    loop.close()
