"""The test cluster itself: it runs Jobs, refuses what RBAC refuses, notices dead nodes, leaves nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from api import BlockingApi, Object
from control_plane import Cluster, KubectlError
from nodes import Nodes
from waiting import wait_for

HERE = Path(__file__).parent


def job(
    name: str, script: str, *, completions: int = 1, pod: Object | None = None, container: Object | None = None
) -> Object:
    """An Indexed Job whose pods each run a shell script and ask for one GPU."""
    main = {
        "name": "main",
        "image": "none",
        "command": ["/bin/sh", "-c", script],
        "resources": {"limits": {"nvidia.com/gpu": 1}},
        "terminationMessagePolicy": "FallbackToLogsOnError",
        **(container or {}),
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {
            "completionMode": "Indexed",
            "completions": completions,
            "parallelism": completions,
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "template": {
                "spec": {
                    "restartPolicy": "Never",
                    "terminationGracePeriodSeconds": 5,
                    "automountServiceAccountToken": False,
                    "containers": [main],
                    **(pod or {}),
                }
            },
        },
    }


def apply(cluster: Cluster, namespace: str, *manifests: Object) -> None:
    for manifest in manifests:
        cluster.kubectl("apply", "--namespace", namespace, "--filename", "-", stdin=json.dumps(manifest))


def job_condition(api: BlockingApi, namespace: str, name: str) -> str:
    """The type of the Job's true conditions, comma-separated."""
    status = api.get(f"/apis/batch/v1/namespaces/{namespace}/jobs/{name}")["status"]
    return ",".join(c["type"] for c in status.get("conditions", []) if c["status"] == "True")


def pods(api: BlockingApi, namespace: str) -> list[Object]:
    return api.list(f"/api/v1/namespaces/{namespace}/pods")


def test_job_runs_to_completion(control_plane: Cluster, api: BlockingApi, namespace: str, nodes: Nodes) -> None:
    nodes.add("node-0", "node-1")
    apply(control_plane, namespace, job("train", "true", completions=4))
    wait_for(lambda: "Complete" in job_condition(api, namespace, "train"), message="the Job completes")
    assert [pod["status"]["phase"] for pod in pods(api, namespace)] == ["Succeeded"] * 4
    assert len({pod["status"]["podIP"] for pod in pods(api, namespace)}) == 4


def test_pods_fill_the_gpus_that_nodes_have(
    control_plane: Cluster, api: BlockingApi, namespace: str, nodes: Nodes
) -> None:
    nodes.add("small-0", "small-1", gpus=2, labels={"example.com/rack": "a"})
    apply(control_plane, namespace, job("train", "exec sleep 60", completions=5))

    def refused() -> list[Object]:
        conditions = [c for pod in pods(api, namespace) for c in pod["status"].get("conditions", [])]
        return [c for c in conditions if c.get("reason") == "Unschedulable"]

    wait_for(lambda: len(nodes.pods()) == 4, message="four pods run")
    assert sorted(pod.node for pod in nodes.pods()) == ["small-0", "small-0", "small-1", "small-1"]
    (condition,) = wait_for(refused, message="the fifth pod finds no node")
    assert "Insufficient nvidia.com/gpu" in condition["message"]


def test_failing_pod_fails_the_job_with_its_message(
    control_plane: Cluster, api: BlockingApi, namespace: str, nodes: Nodes
) -> None:
    nodes.add("node-0")
    apply(control_plane, namespace, job("train", "echo no data at step 7; exit 42"))
    wait_for(lambda: "Failed" in job_condition(api, namespace, "train"), message="the Job fails")
    (pod,) = pods(api, namespace)
    terminated = pod["status"]["containerStatuses"][0]["state"]["terminated"]
    assert pod["status"]["phase"] == "Failed"
    assert (terminated["exitCode"], terminated["reason"]) == (42, "Error")
    assert terminated["message"] == "no data at step 7\n"


def test_container_without_command_is_a_failure_to_start(
    control_plane: Cluster, api: BlockingApi, namespace: str, nodes: Nodes
) -> None:
    nodes.add("node-0")
    apply(control_plane, namespace, job("train", "", container={"command": []}))
    wait_for(lambda: "Failed" in job_condition(api, namespace, "train"), message="the Job fails")
    (pod,) = pods(api, namespace)
    terminated = pod["status"]["containerStatuses"][0]["state"]["terminated"]
    assert terminated["reason"] == "StartError"
    assert "has no command" in terminated["message"]


def test_pods_of_a_job_know_each_other_by_name(
    control_plane: Cluster, api: BlockingApi, namespace: str, nodes: Nodes
) -> None:
    nodes.add("node-0")
    peers = f"train-0.gang train-1.gang.{namespace}.svc.cluster.local"
    container = {"env": [{"name": "PEERS", "value": peers}]}
    manifest = job("train", 'echo "$PEERS"', completions=2, pod={"subdomain": "gang"}, container=container)
    apply(control_plane, namespace, manifest)
    wait_for(lambda: "Complete" in job_condition(api, namespace, "train"), message="the Job completes")
    addresses = {pod["spec"]["hostname"]: pod["status"]["podIP"] for pod in pods(api, namespace)}
    for pod in pods(api, namespace):
        logs = nodes.logs(namespace, pod["metadata"]["name"])
        assert logs.split() == [addresses["train-0"], addresses["train-1"]]


def test_pod_waits_for_its_config_map_and_secret(
    control_plane: Cluster, api: BlockingApi, namespace: str, nodes: Nodes
) -> None:
    nodes.add("node-0")
    volumes = [{"name": "token", "projected": {"sources": [{"secret": {"name": "token"}}]}}]
    container = {
        "envFrom": [{"configMapRef": {"name": "config"}}],
        "env": [{"name": "TOKEN_FILE", "value": "/etc/token/value"}],
        "volumeMounts": [{"name": "token", "mountPath": "/etc/token"}],
    }
    manifest = job("train", 'echo "$GREETING $(cat "$TOKEN_FILE")"', pod={"volumes": volumes}, container=container)
    apply(control_plane, namespace, manifest)

    def bound() -> list[Object]:
        return [pod for pod in pods(api, namespace) if pod["spec"].get("nodeName")]

    (pod,) = wait_for(bound, message="the pod is bound")
    assert pod["status"]["phase"] == "Pending"
    control_plane.kubectl("-n", namespace, "create", "configmap", "config", "--from-literal=GREETING=hello")
    control_plane.kubectl("-n", namespace, "create", "secret", "generic", "token", "--from-literal=value=s3cret")
    wait_for(lambda: "Complete" in job_condition(api, namespace, "train"), message="the Job completes")
    assert nodes.logs(namespace, pod["metadata"]["name"]) == "hello s3cret\n"


def test_annotations_reach_a_running_pod(
    control_plane: Cluster, api: BlockingApi, namespace: str, nodes: Nodes
) -> None:
    nodes.add("node-0")
    item = {"path": "topology", "fieldRef": {"fieldPath": "metadata.annotations['topology']"}}
    container = {
        "env": [{"name": "FILE", "value": "/etc/pod/topology"}],
        "volumeMounts": [{"name": "pod", "mountPath": "/etc/pod"}],
    }
    script = 'until grep --silent rack-1 "$FILE"; do sleep 0.1; done'
    volumes = [{"name": "pod", "downwardAPI": {"items": [item]}}]
    apply(control_plane, namespace, job("train", script, pod={"volumes": volumes}, container=container))
    (pod,) = wait_for(nodes.pods, message="the pod runs")
    control_plane.kubectl("-n", namespace, "annotate", "pod", pod.name, "topology=rack-1")
    wait_for(lambda: "Complete" in job_condition(api, namespace, "train"), message="the pod reads the annotation")


def test_deleted_pod_ends_within_its_grace(
    control_plane: Cluster, api: BlockingApi, namespace: str, nodes: Nodes
) -> None:
    nodes.add("node-0")
    apply(control_plane, namespace, job("train", "trap 'echo saved; exit 0' TERM; sleep 60 & wait"))
    (pod,) = wait_for(nodes.pods, message="the pod runs")
    control_plane.kubectl("-n", namespace, "delete", "job", "train", "--wait=false")
    wait_for(lambda: not pods(api, namespace), message="the pod is gone")
    assert nodes.logs(namespace, pod.name) == "saved\n"
    assert not nodes.pods()


def test_killed_pod_fails_with_137(control_plane: Cluster, api: BlockingApi, namespace: str, nodes: Nodes) -> None:
    nodes.add("node-0")
    apply(control_plane, namespace, job("train", "exec sleep 60"))
    (pod,) = wait_for(nodes.pods, message="the pod runs")
    nodes.kill_pod(namespace, pod.name)
    wait_for(lambda: "Failed" in job_condition(api, namespace, "train"), message="the Job fails")
    (ended,) = pods(api, namespace)
    assert ended["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 137


def test_lost_nodes_are_noticed_and_their_pods_stay(
    control_plane: Cluster, api: BlockingApi, namespace: str, nodes: Nodes
) -> None:
    nodes.add("without-power", "without-network", gpus=1)
    nodes.add("alive", gpus=0)
    apply(control_plane, namespace, job("train", "exec sleep 60", completions=2))
    wait_for(lambda: len(nodes.pods()) == 2, message="both pods run")
    nodes.lose("without-power", processes="killed")
    nodes.lose("without-network", processes="running")

    def silent_nodes() -> list[str]:
        return [
            node["metadata"]["name"]
            for node in api.list("/api/v1/nodes")
            for condition in node["status"]["conditions"]
            if condition["type"] == "Ready" and condition["status"] == "Unknown"
        ]

    wait_for(lambda: sorted(silent_nodes()) == ["without-network", "without-power"], message="both are Unknown")
    assert [pod["status"]["phase"] for pod in pods(api, namespace)] == ["Running"] * 2
    assert [pod.node for pod in nodes.pods()] == ["without-network"]


def test_service_account_may_do_only_what_its_role_says(control_plane: Cluster, namespace: str, tmp_path: Path) -> None:
    control_plane.kubectl("-n", namespace, "create", "serviceaccount", "reader")
    kubeconfig = control_plane.kubeconfig_for(namespace, "reader", tmp_path / "reader")
    with pytest.raises(KubectlError, match=f"system:serviceaccount:{namespace}:reader.* cannot list"):
        control_plane.kubectl("get", "pods", kubeconfig=kubeconfig)
    control_plane.kubectl("-n", namespace, "create", "role", "reader", "--verb=list", "--resource=pods")
    account = f"--serviceaccount={namespace}:reader"
    control_plane.kubectl("-n", namespace, "create", "rolebinding", "reader", "--role=reader", account)

    def listed() -> bool:
        with suppress(KubectlError):
            return control_plane.kubectl("get", "pods", kubeconfig=kubeconfig) == ""
        return False

    wait_for(listed, message="the role is in force")
    with pytest.raises(KubectlError, match="cannot delete"):
        control_plane.kubectl("delete", "pods", "train-0", kubeconfig=kubeconfig)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stop_leaves_no_process_and_no_file(control_plane: Cluster, how: signal.Signals) -> None:
    if not control_plane.is_emulated:
        pytest.skip("starts a control plane of its own, and one was given by --kubeconfig")
    command = [sys.executable, str(HERE / "control_plane.py"), "up"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        directory = Path(owner.stdout.readline().strip().removeprefix("KUBECONFIG=")).parent
        serving = processes_of(directory)
        owner.send_signal(how)
    assert len(serving) == 5  # four servers and their guard
    wait_for(lambda: not processes_of(directory), message="all servers are gone")
    wait_for(lambda: not directory.exists(), message="their directory is gone")


def processes_of(directory: Path) -> list[str]:
    listed = subprocess.run(["ps", "-eww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if str(directory) in line]
