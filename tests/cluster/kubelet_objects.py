"""What a kubelet would write: nodes, leases and pod statuses, as plain JSON. Pure; `nodes.py` sends them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

Object = dict[str, Any]

LEASE_SECONDS = 40  # as a kubelet's
JOB_NAME_LABEL = "batch.kubernetes.io/job-name"
INDEX_ANNOTATION = "batch.kubernetes.io/job-completion-index"


def node(name: str, *, gpus: int, gpu_resource: str, cpus: int, memory: str, labels: Mapping[str, str]) -> Object:
    resources = {"cpu": str(cpus), "memory": memory, "pods": "250", "ephemeral-storage": "100Gi"}
    if gpus:
        resources[gpu_resource] = str(gpus)
    own_labels = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": own_labels | dict(labels)},
        "status": {
            "capacity": resources,
            "allocatable": resources,
            "addresses": [
                {"type": "InternalIP", "address": "127.0.0.1"},
                {"type": "Hostname", "address": name},
            ],
            "conditions": [
                _condition("Ready", True, "KubeletReady"),
                _condition("MemoryPressure", False, "KubeletHasSufficientMemory"),
                _condition("DiskPressure", False, "KubeletHasNoDiskPressure"),
                _condition("PIDPressure", False, "KubeletHasSufficientPID"),
            ],
        },
    }


def lease(node_name: str) -> Object:
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": node_name, "namespace": "kube-node-lease"},
        "spec": {"holderIdentity": node_name, "leaseDurationSeconds": LEASE_SECONDS, **heartbeat()["spec"]},
    }


def heartbeat() -> Object:
    return {"spec": {"renewTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")}}


def running(pod: Object, address: str) -> Object:
    state = {"running": {"startedAt": _now()}}
    return {
        "phase": "Running",
        "hostIP": "127.0.0.1",
        "podIP": address,
        "podIPs": [{"ip": address}],
        "startTime": _now(),
        "conditions": [
            _condition("Initialized", True),
            _condition("ContainersReady", True),
            _condition("Ready", True),
        ],
        "containerStatuses": [_container(container, state, ready=True) for container in _containers(pod)],
    }


def finished(pod: Object, exit_code: int, message: str, reason: str = "") -> Object:
    """The status after the last process ended; `reason` is the container's, by default from the exit code."""
    reason = reason or ("Completed" if exit_code == 0 else "Error")
    started: Object = next((status["state"].get("running", {}) for status in _container_statuses(pod)), {})
    terminated = {
        "exitCode": exit_code,
        "reason": reason,
        "message": message,
        "finishedAt": _now(),
        **started,
    }
    pod_reason = "PodCompleted" if exit_code == 0 else "PodFailed"
    return {
        "phase": "Succeeded" if exit_code == 0 else "Failed",
        "conditions": [
            _condition("Initialized", True, "PodCompleted" if exit_code == 0 else ""),
            _condition("ContainersReady", False, pod_reason),
            _condition("Ready", False, pod_reason),
        ],
        "containerStatuses": [
            _container(container, {"terminated": terminated}, ready=False) for container in _containers(pod)
        ],
    }


def mounted_names(pod: Object) -> Iterator[tuple[str, str, bool]]:
    """The objects that must exist before the pod starts: (`configmaps` or `secrets`, name, may be absent)."""
    for volume in pod["spec"].get("volumes", []):
        for source in [volume, *volume.get("projected", {}).get("sources", [])]:
            if reference := source.get("configMap"):
                yield "configmaps", reference["name"], reference.get("optional", False)
            if reference := source.get("secret"):
                # A volume says secretName, a projected source says name.
                name = reference.get("secretName") or reference["name"]
                yield "secrets", name, reference.get("optional", False)
    for container in _containers(pod):
        references = [variable.get("valueFrom", {}) for variable in container.get("env", [])]
        for source in [*references, *container.get("envFrom", [])]:
            for key, kind in [
                ("configMapKeyRef", "configmaps"),
                ("configMapRef", "configmaps"),
                ("secretKeyRef", "secrets"),
                ("secretRef", "secrets"),
            ]:
                if reference := source.get(key):
                    yield kind, reference["name"], reference.get("optional", False)


def hostname(pod: Object) -> str:
    name: str = pod["spec"].get("hostname") or pod["metadata"]["name"]
    return name


def dns_names(hostname: str, subdomain: str, namespace: str) -> list[str]:
    """The names by which other pods of the namespace reach this one through its headless Service."""
    short = f"{hostname}.{subdomain}"
    return [short, *(f"{short}.{namespace}{suffix}" for suffix in ("", ".svc", ".svc.cluster.local"))]


def _containers(pod: Object) -> list[Object]:
    containers: list[Object] = pod["spec"]["containers"]
    return containers


def _container_statuses(pod: Object) -> list[Object]:
    statuses: list[Object] = pod.get("status", {}).get("containerStatuses", [])
    return statuses


def _container(container: Object, state: Object, *, ready: bool) -> Object:
    return {
        "name": container["name"],
        "image": container["image"],
        "imageID": "",
        "ready": ready,
        "started": ready,
        "restartCount": 0,
        "state": state,
    }


def _condition(kind: str, holds: bool, reason: str = "") -> Object:
    condition = {"type": kind, "status": "True" if holds else "False", "lastTransitionTime": _now()}
    return condition | ({"reason": reason} if reason else {})


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
