"""One HTTP client for the API server: keep-alive connections, JSON by orjson, retries, errors by name.

It knows verbs, paths and patience, and no object: what is sent and what an answer means is for `cluster` to say.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import aiohttp
import orjson

from pylon_operator import metrics
from pylon_operator.api_errors import Unreachable, error_of
from pylon_operator.credentials import Credentials

JSON = "application/json"
MERGE_PATCH = "application/merge-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"  # JSON is YAML, and orjson writes JSON
METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
METADATA_ONLY_WATCH = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"

# 401: a token that has just been rotated; the next try reads it anew.
RETRIED = frozenset({401, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Resource:
    """One kind of the API, and how its URLs are built."""

    api_version: str
    plural: str
    kind: str

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str | None = None) -> str:
        """URL path of a collection (no name), an object, or its subresource."""
        root = "/apis" if "/" in self.api_version else "/api"
        parts = [root, self.api_version]
        if namespace is not None:
            parts += ["namespaces", namespace]
        parts.append(self.plural)
        return "/".join(parts + [part for part in (name, subresource) if part is not None])


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a request may take and how often it is tried. All times in seconds."""

    timeout_seconds: float = 30
    tries: int = 6
    backoff_seconds: float = 0.2
    """Upper bound of the wait before the second try; doubled for each further one, drawn at random below the bound."""
    backoff_limit_seconds: float = 10

    def wait_seconds(self, attempt: int, retry_after: str | None = None) -> float:
        """Wait before try `attempt` + 1: what the server asked for, else exponential with full jitter.

        Full jitter, because workers that failed together should not return together:
        https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
        """
        if retry_after is not None and retry_after.isdigit():
            return min(float(retry_after), 60) + random.uniform(0, self.backoff_seconds)  # noqa: S311
        bound = min(self.backoff_seconds * 2 ** min(attempt - 1, 30), self.backoff_limit_seconds)
        return random.uniform(0, bound)  # noqa: S311


class Api:
    """The API server, for as long as the `async with` block lasts.

    `fence` is called before every request that changes something and raises when this process may no longer write.
    """

    def __init__(
        self,
        credentials: Credentials,
        *,
        patience: Patience | None = None,
        fence: Callable[[], None] = lambda: None,
    ) -> None:
        self._credentials = credentials
        self._patience = patience or Patience()
        self._session: aiohttp.ClientSession
        self.fence = fence

    async def __aenter__(self) -> Self:
        ssl_context = self._credentials.ssl_context()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=64, keepalive_timeout=75, ssl=ssl_context or True),
            headers={"User-Agent": "pylon-operator", "Accept": JSON},
            auto_decompress=True,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def request(
        self,
        verb: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: object = None,
        content_type: str = JSON,
        accept: str = JSON,
        fenced: bool = True,
    ) -> dict[str, Any]:
        """The answer's JSON object.

        Every request that Pylon makes may be sent twice (applies, preconditions, creates that tolerate
        AlreadyExists), so lost connections, 429 and 5xx are retried. Raises ApiError, Unreachable when the tries are
        used up, and whatever `fence` raises; `fenced=False` skips the fence, for the one writer that it rests on.
        """
        if fenced and verb not in ("GET",):
            self.fence()
        data = orjson.dumps(body) if body is not None else None
        headers = {"Accept": accept, **({"Content-Type": content_type} if data is not None else {})}
        timeout = aiohttp.ClientTimeout(total=self._patience.timeout_seconds)
        for attempt in range(1, self._patience.tries + 1):
            last = attempt == self._patience.tries
            try:
                async with self._session.request(
                    verb,
                    self._credentials.server + path,
                    params=query,
                    data=data,
                    headers=headers | self._authorization(),
                    timeout=timeout,
                ) as response:
                    content = await response.read()
                    metrics.API_REQUESTS.labels(verb, str(response.status)).inc()
                    if response.status < 400:
                        return orjson.loads(content)  # type: ignore[no-any-return]
                    if last or response.status not in RETRIED:
                        raise error_of(verb, path, response.status, content)
                    retry_after = response.headers.get("Retry-After")
            except (aiohttp.ClientError, TimeoutError) as error:
                metrics.API_REQUESTS.labels(verb, "none").inc()
                if last:
                    raise Unreachable(verb, path, f"{type(error).__name__}: {error}".rstrip(": ")) from error
                retry_after = None
            await asyncio.sleep(self._patience.wait_seconds(attempt, retry_after))
        raise AssertionError("unreachable: the last try returns or raises")

    async def stream(
        self, path: str, *, query: Mapping[str, str], accept: str = JSON, silence_seconds: float
    ) -> AsyncIterator[dict[str, Any]]:
        """The JSON objects of a watch, until the server ends it.

        Raises ApiError, and Unreachable when the connection breaks or no byte came for `silence_seconds`. Never
        retries: only the watch knows from which version to go on.
        """
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=silence_seconds)
        url = self._credentials.server + path
        headers = {"Accept": accept} | self._authorization()
        try:
            async with self._session.get(url, params=query, headers=headers, timeout=timeout) as response:
                metrics.API_REQUESTS.labels("WATCH", str(response.status)).inc()
                if response.status >= 400:
                    raise error_of("WATCH", path, response.status, await response.read())
                rest = b""
                # Own splitting: aiohttp's readline refuses lines above 128 KiB, which a pod may exceed.
                async for chunk in response.content.iter_any():
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        yield orjson.loads(line)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unreachable("WATCH", path, f"{type(error).__name__}: {error}".rstrip(": ")) from error

    def _authorization(self) -> dict[str, str]:
        header = self._credentials.authorization()
        return {"Authorization": header} if header else {}
