"""Leader election: one at a time, taken over from the dead, given up when lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from fake_api_server import FakeApiServer

from pylon_operator.api import Api
from pylon_operator.lease import Lease, LeaseLost

Eventually = Callable[[Callable[[], object]], Awaitable[None]]


def a_lease(api: Api, identity: str, **options: float) -> Lease:
    defaults = {"retry_seconds": 0.005, "renew_deadline_seconds": 5.0, "duration_seconds": 15}
    return Lease(api, "pylon-system", identity, **defaults | options)  # type: ignore[arg-type]


def holder(server: FakeApiServer) -> str:
    return str(server.objects["leases", "pylon-system", "pylon-operator"]["spec"]["holderIdentity"])


async def acquired(lease: Lease) -> None:
    async with asyncio.timeout(5):
        await lease.acquire()


async def test_the_first_one_leads_and_may_write(server: FakeApiServer, api: Api) -> None:
    lease = a_lease(api, "one")
    with pytest.raises(LeaseLost):
        lease.check()
    await acquired(lease)
    lease.check()
    assert holder(server) == "one"


async def test_a_second_one_waits_while_the_first_renews(
    server: FakeApiServer, api: Api, eventually: Eventually
) -> None:
    first, second = a_lease(api, "one"), a_lease(api, "two", duration_seconds=15)
    await acquired(first)
    renewing, waiting = asyncio.create_task(first.keep()), asyncio.create_task(second.acquire())
    await eventually(lambda: len(server.sent("PUT")) > 5)
    assert not waiting.done()
    renewing.cancel()
    waiting.cancel()


async def test_a_dead_holder_is_succeeded_after_its_time_by_the_waiters_own_clock(
    server: FakeApiServer, api: Api
) -> None:
    dead = a_lease(api, "dead")
    await acquired(dead)
    record = server.objects["leases", "pylon-system", "pylon-operator"]
    record["spec"] |= {"leaseDurationSeconds": 0.05, "renewTime": "2999-01-01T00:00:00.000000Z"}
    server.put("leases", record)
    await acquired(a_lease(api, "heir"))
    assert holder(server) == "heir"


async def test_a_released_lease_is_free_at_once(server: FakeApiServer, api: Api) -> None:
    first = a_lease(api, "one")
    await acquired(first)
    await first.release()
    with pytest.raises(LeaseLost):
        first.check()
    await acquired(a_lease(api, "two"))
    assert holder(server) == "two"
    await first.release()
    assert holder(server) == "two", "one released what was no longer its own"


async def test_a_lease_that_another_took_is_lost(server: FakeApiServer, api: Api) -> None:
    lease = a_lease(api, "one")
    await acquired(lease)
    record = server.objects["leases", "pylon-system", "pylon-operator"]
    record["spec"]["holderIdentity"] = "two"
    server.put("leases", record)
    with pytest.raises(LeaseLost, match="another operator"):
        async with asyncio.timeout(5):
            await lease.keep()


async def test_a_lease_that_cannot_be_renewed_in_time_is_lost(server: FakeApiServer, api: Api) -> None:
    lease = a_lease(api, "one", renew_deadline_seconds=0.1)
    await acquired(lease)
    server.refuse("GET", "/pylon-operator", 503, times=10_000)
    with pytest.raises(LeaseLost, match="not renewed"):
        async with asyncio.timeout(5):
            await lease.keep()
    with pytest.raises(LeaseLost):
        lease.check()


async def test_of_two_that_create_it_at_once_one_leads(server: FakeApiServer, api: Api) -> None:
    server.refuse("POST", "/leases", 409, "AlreadyExists")
    lease = a_lease(api, "one")
    await acquired(lease)
    assert len(server.sent("POST", "/leases")) == 2


async def test_giving_back_what_is_already_lost_asks_nobody(server: FakeApiServer, api: Api) -> None:
    lease = a_lease(api, "one", renew_deadline_seconds=0)
    await acquired(lease)
    before = len(server.requests)
    await lease.release()
    assert len(server.requests) == before
    assert holder(server) == "one"
