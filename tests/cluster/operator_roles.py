"""Permissions for an operator under test, and an operator that runs with them and no others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from api import BlockingApi
from control_plane import Cluster
from operator_process import OperatorProcess

from pylon_operator.permissions import CLUSTER, OWN_NAMESPACE, WORKLOADS, Rule

ACCOUNT = "pylon"


def as_rbac(rule: Rule) -> dict[str, Any]:
    named = {"resourceNames": list(rule.names)} if rule.names else {}
    return {"apiGroups": [rule.group], "resources": [rule.resource], "verbs": list(rule.verbs), **named}


def roles(
    home: str,
    account: str = ACCOUNT,
    cluster: Sequence[Rule] = WORKLOADS + CLUSTER,
    own: Sequence[Rule] = OWN_NAMESPACE,
) -> list[dict[str, Any]]:
    """A ServiceAccount in namespace `home` with exactly these rules: by default those of the operator's own table."""
    api, subject = "rbac.authorization.k8s.io/v1", {"kind": "ServiceAccount", "name": account, "namespace": home}
    name, here = {"name": f"{home}-{account}"}, {"name": account, "namespace": home}
    group = {"apiGroup": "rbac.authorization.k8s.io"}
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": here},
        {"apiVersion": api, "kind": "ClusterRole", "metadata": name, "rules": [as_rbac(rule) for rule in cluster]},
        {
            "apiVersion": api,
            "kind": "ClusterRoleBinding",
            "metadata": name,
            "roleRef": {"kind": "ClusterRole", "name": name["name"], **group},
            "subjects": [subject],
        },
        {"apiVersion": api, "kind": "Role", "metadata": here, "rules": [as_rbac(rule) for rule in own]},
        {
            "apiVersion": api,
            "kind": "RoleBinding",
            "metadata": here,
            "roleRef": {"kind": "Role", "name": account, **group},
            "subjects": [subject],
        },
    ]


@contextmanager
def granted(cluster: Cluster, objects: list[dict[str, Any]]) -> Iterator[None]:
    """These roles, for the length of the block."""
    cluster.apply(*objects)
    try:
        yield
    finally:
        cluster.kubectl("delete", "--wait=false", "--filename", "-", stdin=yaml.safe_dump_all(objects))


@contextmanager
def running_operator(
    cluster: Cluster, api: BlockingApi, home: str, directory: Path, objects: list[dict[str, Any]] | None = None
) -> Iterator[OperatorProcess]:
    """An operator in a namespace of its own, under the roles in `objects`: by default its own table's."""
    api.create("/api/v1/namespaces", {"metadata": {"name": home}})
    try:
        with granted(cluster, roles(home) if objects is None else objects):
            kubeconfig = cluster.kubeconfig_for(home, ACCOUNT, directory / "kubeconfig")
            running = OperatorProcess(kubeconfig, home, directory / "operator.log")
            running.start()
            try:
                yield running
            finally:
                running.stop()
    finally:
        api.delete(f"/api/v1/namespaces/{home}")
