"""The chart on a real API server: Helm installs it, admission takes its pods, RBAC grants exactly what is stated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from api import BlockingApi
from control_plane import Cluster
from waiting import wait_for

from pylon_api import names
from pylon_operator import permissions

pytestmark = pytest.mark.usefixtures("crd")
helm = pytest.importorskip("helm_python", reason="Helm's engine is packaged for Linux only")

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "pylon"
RELEASE = "pylon"
RBAC = "/apis/rbac.authorization.k8s.io/v1"

# What every ServiceAccount may do by system:basic-user: ask about itself.
SELF = {"selfsubjectaccessreviews", "selfsubjectrulesreviews", "selfsubjectreviews"}


@pytest.fixture(scope="module")
def release(control_plane: Cluster, api: BlockingApi) -> Iterator[str]:
    """Namespace of an installed release; pods there must meet the strictest of the pod security standards."""
    namespace = "chart-test"
    enforced = {"pod-security.kubernetes.io/enforce": "restricted"}
    api.create("/api/v1/namespaces", {"metadata": {"name": namespace, "labels": enforced}})
    with helm.Config(kubeconfig_path=control_plane.kubeconfig, namespace=namespace) as config:
        config.install(CHART, RELEASE, namespace=namespace)
        yield namespace
        config.uninstall(RELEASE)
    api.delete(f"/api/v1/namespaces/{namespace}")


def test_admission_takes_the_operators_pod(api: BlockingApi, release: str) -> None:
    pods = f"/api/v1/namespaces/{release}/pods"
    pod, *_ = wait_for(lambda: api.list(pods), message="the Deployment's pod is admitted under the restricted standard")
    assert pod["spec"]["serviceAccountName"] == RELEASE
    assert pod["spec"]["containers"][0]["command"] == ["pylon", "operator"]


def test_upgrade_changes_the_deployment(control_plane: Cluster, api: BlockingApi, release: str) -> None:
    with helm.Config(kubeconfig_path=control_plane.kubeconfig, namespace=release) as config:
        config.upgrade(CHART, RELEASE, {"replicas": 2}, namespace=release)
    deployment = api.get(f"/apis/apps/v1/namespaces/{release}/deployments/{RELEASE}")
    assert deployment["spec"]["replicas"] == 2


def allowed(api: BlockingApi, operator: str, namespace: str, rule: dict[str, str]) -> bool:
    review = api.create(
        "/apis/authorization.k8s.io/v1/subjectaccessreviews",
        {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SubjectAccessReview",
            "spec": {
                "user": f"system:serviceaccount:{operator}:{RELEASE}",
                "groups": ["system:serviceaccounts", f"system:serviceaccounts:{operator}", "system:authenticated"],
                "resourceAttributes": {"namespace": namespace, **rule},
            },
        },
    )
    return bool(review["status"]["allowed"])


def attributes(rules: tuple[permissions.Rule, ...]) -> list[dict[str, str]]:
    return [
        {
            "group": rule.group,
            "resource": rule.resource.partition("/")[0],
            "subresource": rule.resource.partition("/")[2],
            "verb": verb,
            "name": name,
        }
        for rule in rules
        for verb in rule.verbs
        for name in rule.names or ("",)
    ]


def test_operator_may_do_all_that_it_states(api: BlockingApi, release: str) -> None:
    everywhere = attributes(permissions.WORKLOADS + permissions.CLUSTER)
    at_home = attributes(permissions.OWN_NAMESPACE)
    assert [rule for rule in everywhere if not allowed(api, release, "default", rule)] == []
    assert [rule for rule in at_home if not allowed(api, release, release, rule)] == []


@pytest.mark.parametrize(
    ("verb", "resource", "name"),
    [
        ("get", "secrets", "someones-credentials"),
        ("list", "secrets", ""),
        ("watch", "secrets", ""),
        ("update", "secrets", "someones-credentials"),
        ("get", "secrets", permissions.KEY_SECRET),  # its own key, but in another namespace
        ("create", "pods", ""),
        ("create", "pods/exec", ""),
        ("get", "pods/log", ""),
        ("update", "jobs.batch", ""),
        ("create", f"{names.PLURAL}.{names.GROUP}", ""),
        ("patch", f"{names.PLURAL}.{names.GROUP}", ""),
        ("create", "deployments.apps", ""),
        ("create", "serviceaccounts/token", ""),
        ("list", "nodes", ""),
        ("patch", "nodes", ""),
        ("create", "rolebindings.rbac.authorization.k8s.io", ""),
        ("get", "leases.coordination.k8s.io", permissions.LEASE),
        ("impersonate", "users", ""),
    ],
)
def test_operator_may_do_nothing_else(api: BlockingApi, release: str, verb: str, resource: str, name: str) -> None:
    full, _, subresource = resource.partition("/")
    plural, _, group = full.partition(".")
    rule = {"verb": verb, "group": group, "resource": plural, "subresource": subresource, "name": name}
    assert not allowed(api, release, "default", rule)


def test_rules_that_the_server_lists_are_the_stated_ones(control_plane: Cluster, release: str, tmp_path: Path) -> None:
    """Asked as the operator itself, by its own token: no other role grants it anything."""
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": release},
    }
    answer = control_plane.kubectl(
        "create", "--filename=-", "--output=json", "--validate=false",
        stdin=json.dumps(review),
        kubeconfig=control_plane.kubeconfig_for(release, RELEASE, tmp_path / "kubeconfig"),
    )  # fmt: skip
    listed = {
        (group, resource, verb, name)
        for rule in json.loads(answer)["status"]["resourceRules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
        for name in rule.get("resourceNames", [""])
        if resource not in SELF
    }
    stated = permissions.WORKLOADS + permissions.CLUSTER + permissions.OWN_NAMESPACE
    assert listed == {
        (r.group, r.resource, verb, name) for r in stated for verb in r.verbs for name in r.names or ("",)
    }


@pytest.mark.parametrize(
    ("role", "verb", "may"),
    [("view", "get", True), ("view", "create", False), ("edit", "create", True), ("admin", "delete", True)],
)
def test_built_in_roles_cover_jobs(
    control_plane: Cluster, api: BlockingApi, release: str, namespace: str, role: str, verb: str, may: bool
) -> None:
    control_plane.kubectl(
        "create", "rolebinding", "anna", "--namespace", namespace, f"--clusterrole={role}", "--user=anna"
    )

    def answer() -> bool:
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SubjectAccessReview",
            "spec": {
                "user": "anna",
                "resourceAttributes": {
                    "namespace": namespace, "group": names.GROUP, "resource": names.PLURAL, "verb": verb,
                },
            },
        }  # fmt: skip
        status = api.create("/apis/authorization.k8s.io/v1/subjectaccessreviews", review)["status"]
        return bool(status["allowed"])

    def aggregated() -> bool:
        rules = api.get(f"{RBAC}/clusterroles/{role}")["rules"]
        return any(names.GROUP in rule["apiGroups"] for rule in rules)

    wait_for(aggregated, message=f"the rules of {role} are aggregated")
    wait_for(lambda: answer() == may, message=f"{role} may{'' if may else ' not'} {verb}")
