"""Whatever stands at rank 0's address, asking it does no harm."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from operator_builders import a_trainer

from pylon_operator import rank0

SAYS = a_trainer(step=7)
ANSWERS = {
    "a status": web.Response(text=SAYS.model_dump_json(by_alias=True)),
    "nonsense": web.Response(text="<html>"),
    "a refusal": web.Response(status=500),
    "more than fits": web.Response(body=b" " * rank0.MAX_BYTES + SAYS.model_dump_json(by_alias=True).encode()),
}


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.mark.parametrize("name", ANSWERS)
async def test_only_a_status_is_one(session: aiohttp.ClientSession, name: str) -> None:
    async def answer(_: web.Request) -> web.Response:
        return ANSWERS[name]

    app = web.Application()
    app.add_routes([web.get("/status", answer)])
    async with TestServer(app, host="127.0.0.1") as server:
        heard = await rank0.get_status(session, "127.0.0.1", server.port or 0)
    assert heard == (SAYS if name == "a status" else None)


async def test_nobody_there(session: aiohttp.ClientSession) -> None:
    assert await rank0.get_status(session, "127.0.0.1", 1) is None
    assert not await rank0.request_checkpoint(session, "127.0.0.1", 1, "token")
