"""What the operator may do to the API server: one table that start-up checks and the chart's roles mirror.

Reading or deleting a Secret is not in it, but for reading the operator's own key: nobody should have to trust an
operator with every credential of a cluster.
"""

from __future__ import annotations

from dataclasses import dataclass

from pylon_api import names

KEY_SECRET = "pylon-token-key"  # noqa: S105  a name, not a secret
LEASE = "pylon-operator"


@dataclass(frozen=True, slots=True)
class Rule:
    """One RBAC rule: verbs on one resource, on single names where `names` is set."""

    group: str
    resource: str
    verbs: tuple[str, ...]
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        named = f", resourceNames: {list(self.names)}" if self.names else ""
        return f'{{apiGroups: ["{self.group}"], resources: ["{self.resource}"], verbs: {list(self.verbs)}{named}}}'


WORKLOADS = (
    Rule(names.GROUP, names.PLURAL, ("get", "list", "watch", "delete")),
    Rule(names.GROUP, f"{names.PLURAL}/status", ("patch",)),
    Rule("batch", "jobs", ("get", "list", "watch", "create", "patch", "delete")),
    Rule("", "pods", ("list", "watch", "patch", "delete")),
    Rule("", "services", ("get", "list", "watch", "create", "patch", "delete")),
    Rule("", "configmaps", ("get", "list", "watch", "create", "patch", "delete")),
    Rule("", "secrets", ("create",)),
    Rule("events.k8s.io", "events", ("create",)),
)
"""In every namespace that is served."""

CLUSTER = (Rule("", "nodes", ("get",)),)
"""Nodes have no namespace, so this needs a ClusterRole even where namespaces are listed."""

OWN_NAMESPACE = (
    Rule("coordination.k8s.io", "leases", ("create",)),
    Rule("coordination.k8s.io", "leases", ("get", "update"), (LEASE,)),
    Rule("", "secrets", ("create",)),
    Rule("", "secrets", ("get",), (KEY_SECRET,)),
)
"""In the operator's own namespace: the Lease that elects a leader, and the key that job tokens are derived from."""
