"""What the chart promises before any cluster sees it: least privilege, hardened pods, values that are checked."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from pylon_api.run import (
    CheckpointReport,
    DifficultyReport,
    GateDecision,
    GateReport,
    Histogram,
    SaveReport,
    TrainerStatus,
)
from pylon_operator import permissions
from pylon_operator.commands.operator import command as operator_command
from pylon_trainer.metrics import StatusCollector
from pylon_trainer.status import Board

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "pylon"
Object = dict[str, Any]
Render = Callable[..., list[Object]]

VALUES: list[dict[str, Any]] = [
    {},
    {"namespaces": ["team-a", "team-b"]},
    {
        "replicas": 2,
        "imagePullSecrets": ["pull"],
        "priorityClassName": "system-cluster-critical",
        "podLabels": {"a": "b"},
        "podAnnotations": {"a": "b"},
        "nodeSelector": {"a": "b"},
        "tolerations": [{"operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "serviceAccount": {"annotations": {"a": "b"}},
        "metrics": {"service": {"annotations": {"a": "b"}}},
        "dashboards": {"enabled": True, "labels": {"a": "b"}},
    },
    {
        "serviceAccount": {"create": False},
        "rbac": {"create": False, "aggregateToDefaultRoles": False},
        "metrics": {"service": {"enabled": False}},
    },
]


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [obj for obj in objects if obj["kind"] == kind]


def grants(role: Object) -> set[tuple[str, str, str, str]]:
    """Each (group, resource, verb, name or "") that a role allows."""
    return {
        (group, resource, verb, name)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
        for name in rule.get("resourceNames", [""])
    }


def grants_of(rules: tuple[permissions.Rule, ...]) -> set[tuple[str, str, str, str]]:
    return {(r.group, r.resource, verb, name) for r in rules for verb in r.verbs for name in r.names or ("",)}


@pytest.mark.parametrize("values", VALUES)
def test_lint_finds_nothing(values: dict[str, Any]) -> None:
    helm = pytest.importorskip("helm_python", reason="Helm's engine is packaged for Linux only")
    report = helm.lint(CHART, values, strict=True)
    assert report["errors"] == []
    assert [m["error"] for m in report["messages"] if m["severity"] > 1] == []


@pytest.mark.parametrize("values", VALUES)
def test_every_object_is_labelled_and_named_once(render: Render, values: dict[str, Any]) -> None:
    objects = render(**values)
    keys = [(obj["kind"], obj["metadata"].get("namespace"), obj["metadata"]["name"]) for obj in objects]
    assert len(keys) == len(set(keys))
    assert {obj["metadata"]["labels"]["app.kubernetes.io/name"] for obj in objects} == {"pylon"}


def test_roles_grant_what_the_operator_states(render: Render) -> None:
    objects = render()
    cluster = next(r for r in of_kind(objects, "ClusterRole") if r["metadata"]["name"] == "pylon-system:pylon")
    (own,) = of_kind(objects, "Role")
    assert grants(cluster) == grants_of(permissions.WORKLOADS + permissions.CLUSTER)
    assert grants(own) == grants_of(permissions.OWN_NAMESPACE)
    assert own["metadata"]["namespace"] == "pylon-system"


def test_listed_namespaces_get_roles_and_the_cluster_only_nodes(render: Render) -> None:
    objects = render(namespaces=["team-a", "team-b"])
    cluster = next(r for r in of_kind(objects, "ClusterRole") if r["metadata"]["name"] == "pylon-system:pylon")
    assert grants(cluster) == grants_of(permissions.CLUSTER)
    jobs = [role for role in of_kind(objects, "Role") if role["metadata"]["name"] == "pylon-jobs"]
    assert [role["metadata"]["namespace"] for role in jobs] == ["team-a", "team-b"]
    assert all(grants(role) == grants_of(permissions.WORKLOADS) for role in jobs)
    (container,) = of_kind(objects, "Deployment")[0]["spec"]["template"]["spec"]["containers"]
    assert {"--namespace=team-a", "--namespace=team-b"} <= set(container["args"])


@pytest.mark.parametrize("values", [*VALUES, {"logFormat": "text", "pollSeconds": 1.5}])
def test_operator_understands_its_command_line(render: Render, values: dict[str, Any]) -> None:
    (deployment,) = of_kind(render(**values), "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["pylon", "operator"]
    options = operator_command.make_context("operator", list(container["args"])).params
    assert options["image"] == "pylon-trainer:0.1.0"
    assert list(options["namespaces"]) == values.get("namespaces", [])


@pytest.mark.parametrize("values", VALUES)
def test_no_role_reads_secrets_makes_pods_or_has_a_wildcard(render: Render, values: dict[str, Any]) -> None:
    for role in of_kind(render(**values), "ClusterRole") + of_kind(render(**values), "Role"):
        for group, resource, verb, name in grants(role):
            assert "*" not in (group, resource, verb)
            assert resource != "secrets" or verb == "create" or (verb == "get" and name == permissions.KEY_SECRET)
            assert (resource, verb) not in {("pods", "create"), ("pods/exec", "create"), ("pods/exec", "get")}
            assert group != "rbac.authorization.k8s.io"


@pytest.mark.parametrize("values", VALUES)
def test_bindings_bind_what_exists_to_the_operator_alone(render: Render, values: dict[str, Any]) -> None:
    objects = render(**values)
    (deployment,) = of_kind(objects, "Deployment")
    account = deployment["spec"]["template"]["spec"]["serviceAccountName"]
    roles = {(r["kind"], r["metadata"].get("namespace"), r["metadata"]["name"]) for r in objects if "rules" in r}
    for binding in of_kind(objects, "ClusterRoleBinding") + of_kind(objects, "RoleBinding"):
        reference = binding["roleRef"]
        assert (reference["kind"], binding["metadata"].get("namespace"), reference["name"]) in roles
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": "pylon-system"}]


def test_pod_is_restricted_and_probed(render: Render) -> None:
    (deployment,) = of_kind(render(), "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "runAsGroup": 65532,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert (container["livenessProbe"]["httpGet"]["path"], container["readinessProbe"]["httpGet"]["path"]) == (
        "/healthz",
        "/readyz",
    )
    assert container["resources"]["requests"].keys() == {"cpu", "memory"}
    assert "limits" in container["resources"]


def test_selector_selects_the_pods_and_the_service_finds_the_port(render: Render) -> None:
    objects = render(podLabels={"team": "ml"}, metrics={"port": 9090})
    (deployment,) = of_kind(objects, "Deployment")
    (service,) = of_kind(objects, "Service")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for selector in (deployment["spec"]["selector"]["matchLabels"], service["spec"]["selector"]):
        assert selector.items() <= labels.items()
    ports = {p["name"]: p["containerPort"] for p in deployment["spec"]["template"]["spec"]["containers"][0]["ports"]}
    assert ports == {"metrics": 9090, "health": 8081}
    assert service["spec"]["ports"] == [{"name": "metrics", "port": 9090, "targetPort": "metrics"}]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"replica": 2}, "replica"),
        ({"replicas": "2"}, "replicas"),
        ({"image": {"repository": "x", "tag": "latest"}}, "tag"),
        ({"logFormat": "xml"}, "logFormat"),
        ({"health": {"port": 80}}, "port"),
        ({"namespaces": ["Team A"]}, "namespaces"),
    ],
)
def test_wrong_value_is_named(render: Render, values: dict[str, Any], said: str) -> None:
    helm = pytest.importorskip("helm_python", reason="Helm's engine is packaged for Linux only")
    with pytest.raises(helm.HelmValuesError, match=said):
        render(**values)


def test_dashboards_ask_for_metrics_that_a_trainer_serves(render: Render) -> None:
    (config,) = of_kind(render(dashboards={"enabled": True}), "ConfigMap")
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    dashboard = json.loads(config["data"]["training.json"])
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    asked = {name for query in queries for name in re.findall(r"pylon_trainer_\w+", query)}
    gate = GateReport(decision=GateDecision.GATED, ratio=0.5, retained_mass=0.9, effective_token_share=0.8)
    counts = Histogram(bounds=[1], counts=[1, 0], sum=1)
    status = TrainerStatus(uid="u", attempt=1, loss=2, held_out_loss=2, tokens_per_second=100, gate=gate)
    difficulty = DifficultyReport(gradient_norm=counts, entropy=counts)
    saved = CheckpointReport(step=1, uri="u", size_bytes=1, committed_time=datetime.now(UTC))
    saves = SaveReport(stall_seconds=0.1, write_seconds=1)
    more = {"difficulty": difficulty, "checkpoint": saved, "saves": saves}
    board = Board(status.model_copy(update=more))
    served = {sample.name for metric in StatusCollector(board).collect() for sample in metric.samples}
    assert asked
    assert asked <= served


def test_every_value_is_commented_and_in_the_schema() -> None:
    text = (CHART / "values.yaml").read_text()
    lines = text.partition("\nresources:")[0].splitlines() + text.partition("\npriorityClassName:")[2].splitlines()[1:]
    uncommented = [
        line
        for above, line in itertools.pairwise(["", *lines])
        if re.match(r" *[a-zA-Z]+: \S", line) and not above.lstrip().startswith("#")
    ]
    assert uncommented == []
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert yaml.safe_load(text).keys() == schema["properties"].keys() - {"global"}


def test_chart_and_program_have_one_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert f'version = "{chart["version"]}"' in (ROOT / "pyproject.toml").read_text()
    assert chart["version"] == chart["appVersion"]
