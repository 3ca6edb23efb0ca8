"""Before the work: what is missing is one line with its fix, and secrets stay where they are."""

from __future__ import annotations

import base64
import json
import logging
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fake_api_server import FakeApiServer

from pylon_operator.api import Api
from pylon_operator.logs import LogFormat, StructuredFormatter
from pylon_operator.permissions import CLUSTER, OWN_NAMESPACE, WORKLOADS
from pylon_operator.preflight import PreflightError, check_cluster
from pylon_operator.probes import serve_probes
from pylon_operator.token_key import TokenKeyError, ensure_token_key, read_token_key


class TestPreflight:
    """Access reviews are answered by a script: all are granted but those that `denied` names."""

    async def check(self, server: FakeApiServer, api: Api, denied: set[tuple[str, str]]) -> None:
        create = server._create

        def review(plural: str, namespace: str, body: dict[str, Any]) -> Any:
            if plural != "selfsubjectaccessreviews":
                return create(plural, namespace, body)
            asked = body["spec"]["resourceAttributes"]
            allowed = (asked["verb"], asked["resource"]) not in denied
            return aiohttp.web.json_response({"status": {"allowed": allowed}}, status=201)

        server._create = review  # type: ignore[method-assign]
        await check_cluster(api, namespaces=("team",), own_namespace="pylon-system")

    async def test_every_permission_of_the_table_is_asked_for(self, server: FakeApiServer, api: Api) -> None:
        await self.check(server, api, set())
        asked = [r.body["spec"]["resourceAttributes"] for r in server.sent("POST")]
        assert len(asked) == sum(len(rule.verbs) for rule in (*WORKLOADS, *CLUSTER, *OWN_NAMESPACE))
        assert {"namespace": "", "resource": "nodes", "verb": "get"}.items() <= next(
            a for a in asked if a["resource"] == "nodes"
        ).items()

    async def test_a_missing_permission_names_the_rule_to_add(self, server: FakeApiServer, api: Api) -> None:
        with pytest.raises(PreflightError) as error:
            await self.check(server, api, {("create", "jobs"), ("patch", "jobs")})
        assert error.value.exit_code == 77
        assert str(error.value) == (
            "permissions are missing: create/patch jobs in namespace team (add the rule "
            '{apiGroups: ["batch"], resources: ["jobs"], '
            "verbs: ['get', 'list', 'watch', 'create', 'patch', 'delete']})"
        )

    async def test_a_missing_crd_names_the_command(self, server: FakeApiServer, api: Api) -> None:
        server.refuse("GET", "/pylonjobs", 404, "NotFound")
        with pytest.raises(PreflightError, match=r"pylonjobs.pylon.dev .* kubectl apply -f crds/") as error:
            await self.check(server, api, set())
        assert error.value.exit_code == 78

    async def test_a_server_that_is_away_says_so(self, server: FakeApiServer, api: Api) -> None:
        server.refuse("GET", "/pylonjobs", 503, times=10)
        with pytest.raises(PreflightError) as error:
            await self.check(server, api, set())
        assert error.value.exit_code == 69


def test_no_secret_may_be_read_or_deleted_but_the_operators_own() -> None:
    rules = [rule for rule in (*WORKLOADS, *CLUSTER, *OWN_NAMESPACE) if rule.resource == "secrets"]
    assert [(rule.verbs, rule.names) for rule in rules if rule.verbs != ("create",)] == [
        (("get",), ("pylon-token-key",))
    ]


class TestTokenKey:
    """The key is made once and found again by every later operator."""

    async def test_it_is_made_once(self, server: FakeApiServer, api: Api) -> None:
        first = await ensure_token_key(api, "pylon-system")
        assert len(first) == 32
        assert await ensure_token_key(api, "pylon-system") == first
        assert len(server.sent("POST")) == 1

    async def test_of_two_operators_at_once_one_makes_it(self, server: FakeApiServer, api: Api) -> None:
        theirs = base64.b64encode(b"t" * 32).decode()
        server.put(
            "secrets", {"metadata": {"name": "pylon-token-key", "namespace": "pylon-system"}, "data": {"key": theirs}}
        )
        server.refuse("GET", "/pylon-token-key", 404, "NotFound")
        assert await ensure_token_key(api, "pylon-system") == b"t" * 32

    def test_a_file_is_taken_as_it_is(self, tmp_path: Path) -> None:
        (tmp_path / "key").write_bytes(b"x" * 16 + b"\n")
        assert read_token_key(tmp_path / "key") == b"x" * 16

    @pytest.mark.parametrize(("content", "problem"), [(b"short", "needs at least 16"), (None, "No such file")])
    def test_a_bad_file_is_one_line(self, tmp_path: Path, content: bytes | None, problem: str) -> None:
        if content is not None:
            (tmp_path / "key").write_bytes(content)
        with pytest.raises(TokenKeyError, match=problem) as error:
            read_token_key(tmp_path / "key")
        assert "short" not in str(error.value)


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_log_line_is_one_line_and_names_its_job(form: LogFormat) -> None:
    record = logging.makeLogRecord({"msg": 'two\nlines "x"', "levelname": "INFO", "name": "n", "job": "team/a"})
    line = StructuredFormatter(form).format(record)
    assert "\n" not in line
    if form == "json":
        assert json.loads(line)["job"] == "team/a"
        assert json.loads(line)["message"] == 'two\nlines "x"'
    else:
        assert line.endswith(r'message="two\nlines \"x\"" job=team/a')


async def test_probes_say_what_is_wrong(unused_tcp_port_factory: Any) -> None:
    health, metrics = unused_tcp_port_factory(), unused_tcp_port_factory()
    complaints: list[str] = []
    refreshed: list[int] = []
    async with (
        serve_probes(
            health_port=health,
            metrics_port=metrics,
            alive=lambda: complaints,
            ready=lambda: (),
            refresh=lambda: refreshed.append(1),
            host="127.0.0.1",
        ),
        aiohttp.ClientSession() as session,
    ):

        async def get(port: int, path: str) -> tuple[int, str]:
            async with session.get(f"http://127.0.0.1:{port}{path}") as response:
                return response.status, await response.text()

        assert await get(health, "/healthz") == (200, "ok")
        complaints += ["the watch of pods has heard nothing for 700 s"]
        assert await get(health, "/healthz") == (503, complaints[0])
        assert await get(health, "/readyz") == (200, "ok")
        status, text = await get(metrics, "/metrics")
        assert (status, refreshed) == (200, [1])
        assert "pylon_queue_depth" in text
