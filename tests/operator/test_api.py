"""The HTTP client: what it retries, how long it waits, and by what name it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_api_server import HASTY, FakeApiServer, credentials_for

from pylon_operator.api import Api, Patience
from pylon_operator.api_errors import (
    AlreadyExists,
    ApiError,
    Conflict,
    Forbidden,
    Gone,
    Invalid,
    NamespaceTerminating,
    NotFound,
    Unreachable,
)
from pylon_operator.credentials import CredentialsError, load_credentials
from pylon_operator.kinds import JOBS, NODES, PODS, PYLON_JOBS

POD = PODS.path("team", "p")


def put_pod(server: FakeApiServer) -> None:
    server.put("pods", {"metadata": {"name": "p", "namespace": "team"}})


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (PODS.path(), "/api/v1/pods"),
        (POD, "/api/v1/namespaces/team/pods/p"),
        (NODES.path(name="n"), "/api/v1/nodes/n"),
        (JOBS.path("team"), "/apis/batch/v1/namespaces/team/jobs"),
        (PYLON_JOBS.path("team", "j", "status"), "/apis/pylon.dev/v1alpha1/namespaces/team/pylonjobs/j/status"),
    ],
)
def test_paths(path: str, expected: str) -> None:
    assert path == expected


@pytest.mark.parametrize("status", [401, 429, 500, 502, 503, 504])
async def test_passing_trouble_is_retried(server: FakeApiServer, api: Api, status: int) -> None:
    put_pod(server)
    server.refuse("GET", "/p", status, times=2)
    assert (await api.request("GET", POD))["metadata"]["name"] == "p"
    assert len(server.sent("GET")) == 3


async def test_a_lost_connection_is_retried_until_the_tries_are_used_up(tmp_path: Path) -> None:
    async with Api(credentials_for("http://127.0.0.1:9", tmp_path), patience=HASTY) as api:
        with pytest.raises(Unreachable, match=r"^GET /api/v1/pods: Client"):
            await api.request("GET", PODS.path())


async def test_the_last_error_is_raised_when_tries_are_used_up(server: FakeApiServer, api: Api) -> None:
    server.refuse("GET", "/p", 503, message="etcd is away", times=HASTY.tries)
    with pytest.raises(ApiError, match="etcd is away"):
        await api.request("GET", POD)
    assert len(server.sent("GET")) == HASTY.tries


@pytest.mark.parametrize(
    ("status", "reason", "causes", "kind"),
    [
        (400, "BadRequest", None, Invalid),
        (403, "Forbidden", None, Forbidden),
        (403, "Forbidden", [{"reason": "NamespaceTerminating"}], NamespaceTerminating),
        (404, "NotFound", None, NotFound),
        (409, "Conflict", None, Conflict),
        (409, "AlreadyExists", None, AlreadyExists),
        (410, "Expired", None, Gone),
        (422, "Invalid", None, Invalid),
        (418, "", None, ApiError),
    ],
)
async def test_refusals_have_names_and_are_not_retried(
    server: FakeApiServer, api: Api, status: int, reason: str, causes: list[dict[str, str]] | None, kind: type
) -> None:
    server.refuse("POST", "/pods", status, reason, "spec.x:\n  too   long", causes=causes)
    with pytest.raises(ApiError) as raised:
        await api.request("POST", PODS.path("team"), body={"secret": "hush"})
    assert type(raised.value) is kind
    assert str(raised.value) == "POST /api/v1/namespaces/team/pods: spec.x: too long"
    assert len(server.sent("POST")) == 1


async def test_the_server_says_how_long_to_wait(server: FakeApiServer, api: Api) -> None:
    assert 7 <= Patience().wait_seconds(1, "7") <= 7 + Patience().backoff_seconds
    put_pod(server)
    server.refuse("GET", "/p", 429, headers={"Retry-After": "0"})
    await api.request("GET", POD)


@pytest.mark.parametrize("attempt", [1, 5, 5000])
def test_waits_are_bounded(attempt: int) -> None:
    patience = Patience(backoff_seconds=1, backoff_limit_seconds=30)
    assert all(0 <= patience.wait_seconds(attempt) <= min(2 ** (attempt - 1), 30) for _ in range(100))


async def test_a_fenced_client_reads_and_does_not_write(server: FakeApiServer, api: Api) -> None:
    class NotLeader(Exception):
        pass

    def fence() -> None:
        raise NotLeader

    put_pod(server)
    api.fence = fence
    await api.request("GET", POD)
    for verb in ("POST", "PATCH", "PUT", "DELETE"):
        with pytest.raises(NotLeader):
            await api.request(verb, POD, body={})
    assert [r.method for r in server.requests] == ["GET"]


async def test_the_token_is_sent(server: FakeApiServer, api: Api) -> None:
    put_pod(server)
    await api.request("GET", POD)
    assert server.requests[0].headers["Authorization"] == "Bearer t0ken"


def test_no_cluster_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text("apiVersion: v1\nkind: Config\n")
    with pytest.raises(CredentialsError, match=r"^no way to a cluster: .*--kubeconfig") as raised:
        load_credentials(path)
    assert "\n" not in str(raised.value)
