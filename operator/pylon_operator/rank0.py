"""Talks to the trainer of rank 0, which speaks for the whole gang.

It raises nothing: a trainer that does not answer, or answers nonsense, is one that has not answered, and what follows
from that is the plan's to decide.
"""

from __future__ import annotations

import aiohttp
from pydantic import ValidationError

from pylon_api.run import TrainerStatus

MAX_BYTES = 1 << 20
"""Of an answer; a status takes kilobytes, and one user's pod must not fill the operator's memory."""
TIMEOUT = aiohttp.ClientTimeout(total=3)
"""A trainer answers from a thread of its own in milliseconds; whoever takes longer is as good as gone."""


async def get_status(session: aiohttp.ClientSession, host: str, port: int) -> TrainerStatus | None:
    """GET /status, or None without an answer."""
    try:
        async with session.get(f"http://{host}:{port}/status", timeout=TIMEOUT) as answer:
            answer.raise_for_status()
            return TrainerStatus.model_validate_json(await _read(answer))
    except (aiohttp.ClientError, TimeoutError, ValidationError):
        return None


async def request_checkpoint(session: aiohttp.ClientSession, host: str, port: int, token: str) -> bool:
    """POST /checkpoint with the job's token. Whether the trainer took it."""
    try:
        headers = {"Authorization": f"Bearer {token}"}
        async with session.post(f"http://{host}:{port}/checkpoint", headers=headers, timeout=TIMEOUT) as answer:
            return answer.ok
    except (aiohttp.ClientError, TimeoutError):
        return False


async def _read(answer: aiohttp.ClientResponse) -> bytes:
    body = b""
    async for chunk in answer.content.iter_any():
        body += chunk
        if len(body) > MAX_BYTES:
            raise aiohttp.ClientPayloadError(f"an answer of more than {MAX_BYTES} bytes")
    return body
