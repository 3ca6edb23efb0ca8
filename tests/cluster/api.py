"""Requests to a Kubernetes API in plain JSON, for tests and the emulated nodes.

One aiohttp pool and dictionaries: no models, no retries, no discovery. Paths are the API's own
(`/api/v1/namespaces/default/pods`).
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import AsyncIterator, Coroutine, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
import orjson
from kubernetes.client import Configuration
from kubernetes.config import load_kube_config

Object = dict[str, Any]
T = TypeVar("T")

JSON = "application/json"
MERGE_PATCH = "application/merge-patch+json"
STRATEGIC_MERGE_PATCH = "application/strategic-merge-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"

PAGE_SIZE = 500
LONGEST_LINE_BYTES = 4 * 1024**2  # a watch sends one object to a line


class ApiError(RuntimeError):
    """The server's refusal: `status` is the HTTP code, the message is the server's own."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class Api:
    """Must be opened and used on one event loop."""

    def __init__(self, kubeconfig: Path) -> None:
        self._settings = Configuration()
        load_kube_config(  # type: ignore[no-untyped-call]
            str(kubeconfig), client_configuration=self._settings, persist_config=False
        )

    async def __aenter__(self) -> Self:
        settings = self._settings
        context = ssl.create_default_context(cafile=settings.ssl_ca_cert)
        if settings.cert_file:
            context.load_cert_chain(settings.cert_file, settings.key_file)
        token = settings.get_api_key_with_prefix("BearerToken")
        self._session = aiohttp.ClientSession(
            base_url=settings.host,
            headers={"Authorization": token} if token else {},
            connector=aiohttp.TCPConnector(ssl=context, limit=32),
            read_bufsize=LONGEST_LINE_BYTES,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def request(
        self,
        method: str,
        path: str,
        body: Object | None = None,
        content_type: str = JSON,
        query: Mapping[str, str] | None = None,
    ) -> Object:
        """The answer's JSON; raises `ApiError` on any HTTP error."""
        data = None if body is None else orjson.dumps(body)
        headers = {"Content-Type": content_type}
        async with self._session.request(method, path, data=data, headers=headers, params=query or {}) as response:
            answer = await response.read()
            if response.status >= 400:
                raise ApiError(response.status, _message(answer))
            parsed: Object = orjson.loads(answer)
            return parsed

    async def list(self, path: str, query: Mapping[str, str] | None = None) -> tuple[list[Object], str]:
        """All objects, fetched in pages, and the resource version to watch from."""
        objects: list[Object] = []
        token = ""
        while True:
            params = {**(query or {}), "limit": str(PAGE_SIZE), "continue": token}
            page = await self.request("GET", path, query=params)
            objects += page["items"]
            token = page["metadata"].get("continue", "")
            if not token:
                return objects, page["metadata"]["resourceVersion"]

    async def watch(
        self, path: str, version: str, query: Mapping[str, str] | None = None
    ) -> AsyncIterator[tuple[str, Object]]:
        """Events after `version` until the server ends the stream; `ApiError` 410 if that is too old."""
        timeout = aiohttp.ClientTimeout(total=None)
        params = {**(query or {}), "watch": "1", "allowWatchBookmarks": "true", "resourceVersion": version}
        async with self._session.get(path, params=params, timeout=timeout) as response:
            if response.status >= 400:
                raise ApiError(response.status, _message(await response.read()))
            async for line in response.content:
                event = orjson.loads(line)
                if event["type"] == "ERROR":
                    raise ApiError(event["object"]["code"], event["object"]["message"])
                yield event["type"], event["object"]


def _message(answer: bytes) -> str:
    try:
        message: str = orjson.loads(answer)["message"]
        return message
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return answer.decode(errors="replace")


class Background:
    """An event loop on a thread of its own, for code that must go on while a test blocks."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, T], timeout_seconds: float = 60.0) -> T:
        """Runs `work` there and waits for its result here."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_seconds)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class BlockingApi:
    """`Api` for tests that are plain functions."""

    def __init__(self, api: Api, background: Background) -> None:
        self._api = api
        self._background = background

    def get(self, path: str, **query: str) -> Object:
        return self._background.call(self._api.request("GET", path, query=query))

    def list(self, path: str, **query: str) -> list[Object]:
        return self._background.call(self._api.list(path, query))[0]

    def create(self, path: str, body: Object) -> Object:
        return self._background.call(self._api.request("POST", path, body))

    def patch(self, path: str, body: Object, content_type: str = MERGE_PATCH) -> Object:
        return self._background.call(self._api.request("PATCH", path, body, content_type))

    def delete(self, path: str, **query: str) -> Object:
        return self._background.call(self._api.request("DELETE", path, query=query))
