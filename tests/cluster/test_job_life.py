"""What befalls a job between its manifest and its end, on a real API server, with stand-ins for the trainer or no pods.

What needs a trainer that trains is in test_training.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api import STRATEGIC_MERGE_PATCH, ApiError, BlockingApi
from applied_job import Apply
from control_plane import Cluster
from local_jobs import fake_job
from nodes import Nodes
from operator_process import OperatorProcess
from operator_roles import running_operator
from waiting import wait_for

from pylon_api import names
from pylon_api.run import RunConfig

pytestmark = pytest.mark.usefixtures("crd", "operator")

FOR_EVER = ["sh", "-c", "trap 'sleep 1; exit 75' TERM; sleep 3600 & wait"]
"""As the trainer does: a moment to save, then the code for being told to stop."""
PODS = "/api/v1/namespaces/{}/pods"


@pytest.fixture(scope="module")
def operator(
    control_plane: Cluster, api: BlockingApi, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OperatorProcess]:
    with running_operator(control_plane, api, "pylon-life", tmp_path_factory.mktemp("operator")) as running:
        yield running


def manifest(command: list[str] | None = None, *, name: str = "life", **spec: Any) -> dict[str, Any]:
    """A job whose pods run `command` in the trainer's place, by default one that succeeds at once."""
    template = {"spec": {"containers": [{"name": names.CONTAINER, "command": command or ["true"]}]}}
    training = {"data": {"train": ["/data/*.txt"]}, "schedule": {"steps": 1}}
    defaults = {"template": template, "failurePolicy": {"backoffSeconds": 0}, "training": training}
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": name},
        "spec": defaults | spec,
    }


def stand_in(directory: Path, **options: Any) -> dict[str, Any]:
    """A job whose pods count steps and commit them to a file below `directory`."""
    job = fake_job(directory, **options)
    del job["metadata"]["namespace"]
    return job


def test_gpus_that_no_node_has(apply: Apply, nodes: Nodes) -> None:
    nodes.add("node-0", "node-1", gpus=2)
    job = apply(manifest(nodes=2, gpusPerNode=4))
    job.wait_for_condition("PodsReady", "False", "2 cannot start, life-a1-0-", "Insufficient nvidia.com/gpu")
    nodes.add("node-2", "node-3", gpus=4)
    job.wait_for_condition("Succeeded", "True")


def test_an_image_that_cannot_be_pulled(apply: Apply, api: BlockingApi, namespace: str) -> None:
    """No node here pulls images, so what a kubelet would write is written for it."""
    job = apply(manifest())
    (pod,) = wait_for(lambda: api.list(PODS.format(namespace)), 30, "the pod")
    waiting = {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "nowhere/trainer"'}
    container = {"name": names.CONTAINER, "image": "", "imageID": "", "ready": False, "restartCount": 0}
    status = {"containerStatuses": [container | {"state": {"waiting": waiting}}]}
    api.patch(f"{PODS.format(namespace)}/{pod['metadata']['name']}/status", {"status": status}, STRATEGIC_MERGE_PATCH)
    job.wait_for_condition("PodsReady", "False", 'ImagePullBackOff: Back-off pulling image "nowhere/trainer"')


def test_a_quota_that_refuses_pods(apply: Apply, api: BlockingApi, namespace: str) -> None:
    quotas = f"/api/v1/namespaces/{namespace}/resourcequotas"
    api.create(quotas, {"metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}})
    wait_for(lambda: api.get(f"{quotas}/none").get("status", {}).get("hard"), 30, "the quota is in force")
    job = apply(manifest())
    job.wait_for_condition("PodsReady", "False", "1 do not exist yet: `kubectl describe job life-a1` says why")


def test_suspended_from_the_start(apply: Apply, nodes: Nodes) -> None:
    nodes.add("node-0")
    job = apply(manifest(suspend=True))
    job.wait_for_condition("Suspended", "True", "SuspendedByUser")
    assert job.children() == []
    job.patch(suspend=False)
    job.wait_for_condition("Succeeded", "True")
    assert job.seen.status.attempt == 1


def test_the_deadline_ends_it_and_its_pods(apply: Apply, nodes: Nodes, namespace: str) -> None:
    nodes.add("node-0")
    job = apply(manifest(FOR_EVER, activeDeadlineSeconds=2))
    job.wait_for_condition("Succeeded", "False", "DeadlineExceeded", "activeDeadlineSeconds is 2")
    wait_for(lambda: not nodes.live_pods(namespace), 30, "its processes are gone")
    assert job.batch_jobs() == []


def test_the_ttl_deletes_it_with_all_that_it_owns(apply: Apply, nodes: Nodes) -> None:
    nodes.add("node-0")
    job = apply(manifest(ttlSecondsAfterFinished=1))

    def gone() -> bool:
        try:
            return job.seen is None
        except ApiError as error:
            return error.status == 404

    wait_for(gone, 30, "the PylonJob is deleted")
    # The garbage collector learns of a new kind, which PylonJob is at first, within half a minute.
    wait_for(lambda: not job.children(), 60, "and all that it owned")


def test_the_longest_name(apply: Apply, nodes: Nodes) -> None:
    nodes.add("node-0")
    job = apply(manifest(name="n" * names.MAX_JOB_NAME_LENGTH, nodes=2))
    job.wait_for_condition("Succeeded", "True")


def test_a_deleted_job_is_the_end_of_its_attempt(apply: Apply, control_plane: Cluster, namespace: str) -> None:
    job = apply(manifest(nodes=2))
    job.wait(lambda seen: seen.status.attempt_job_uid, "the Job is on record")
    control_plane.kubectl("delete", "job", "life-a1", "--namespace", namespace)
    job.wait(lambda _: job.batch_jobs() == ["life-a2"], "attempt 2", 30)
    status = job.seen.status
    assert [(failure.attempt, failure.reason) for failure in status.failures] == [(1, "JobDeleted")]
    assert status.restarts == 1


def test_deleted_children_come_back(apply: Apply, control_plane: Cluster, namespace: str) -> None:
    job = apply(manifest())
    job.wait(lambda seen: seen.status.attempt_job_uid, "the Job is on record")
    control_plane.kubectl("delete", "service/life-a1", "configmap/life-a1", "--namespace", namespace)
    wait_for(lambda: job.children().count("life-a1") == 3, 30, "Service, ConfigMap and Job")
    assert job.seen.status.attempt == 1


def test_failing_saves_are_told_until_the_next_commit(apply: Apply, nodes: Nodes, tmp_path: Path) -> None:
    nodes.add("node-0")
    job = apply(stand_in(tmp_path, steps=1_000_000, step_seconds=0.02, commit_every=10))
    job.wait_for_condition("CheckpointReady", "True", "Committed", "Step ", "2.0 MB")
    refusal = tmp_path / "fake" / "refusal"

    refusal.write_text("cannot write s3://bucket/runs: 503 Slow Down")
    # A count may show itself ten seconds late, as steps do.
    job.wait_for_condition("CheckpointReady", "False", "SavesFail", "503 Slow Down; newest committed: Step ")
    assert job.condition("Running")[0] == "True", "training goes on"
    kept = job.seen.status.checkpoint
    refusal.unlink()

    job.wait_for_condition("CheckpointReady", "True", "Committed")
    assert kept is not None
    assert job.seen.status.checkpoint.step > kept.step  # type: ignore[union-attr]  # there was one before
    assert job.events().count("SavesFail") == 1, "once for all that failed in a row"


def test_a_restart_counts_for_the_interval_of_checkpoints(
    apply: Apply, api: BlockingApi, nodes: Nodes, namespace: str, tmp_path: Path
) -> None:
    nodes.add("node-0")
    deaths = [{"attempt": 1, "step": 120, "code": 70}]
    job = apply(stand_in(tmp_path, steps=1_000_000, step_seconds=0.02, commit_every=10, deaths=deaths))
    job.wait(lambda seen: seen.status.attempt == 2 and seen.status.phase == "Running", "attempt 2 runs", 30)
    stored = api.get(f"/api/v1/namespaces/{namespace}/configmaps/demo-a2")["data"]
    config = RunConfig.model_validate_json(stored[names.CONFIG_FILE])
    assert config.failures == 1
    assert config.run_seconds >= 2, "120 steps of 20 ms"


def test_a_local_directory_that_would_go_with_the_pod_ends_the_job_before_any_pod(apply: Apply, tmp_path: Path) -> None:
    bad = stand_in(tmp_path)
    bad["spec"]["training"]["checkpoint"]["local"] = {"directory": "/tmp/pylon/copies"}
    job = apply(bad)
    said = "spec.training.checkpoint.local.directory: the volume 'scratch' at /tmp/pylon (emptyDir) keeps nothing"
    job.wait_for_condition("Succeeded", "False", "InvalidSpec", said)
    assert job.batch_jobs() == []


def test_an_eviction_is_told_from_a_failure(apply: Apply, api: BlockingApi, nodes: Nodes, namespace: str) -> None:
    nodes.add("node-0")
    free = {"action": "RestartFreely", "podReasons": ["Evicted"]}
    job = apply(manifest(FOR_EVER, nodes=2, failurePolicy={"backoffSeconds": 0, "maxRestarts": 0, "rules": [free]}))
    job.wait(lambda seen: seen.status.phase == "Running", "both pods run")
    victim = nodes.live_pods(namespace)[1]

    evict = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": victim, "namespace": namespace}}
    api.create(f"{PODS.format(namespace)}/{victim}/eviction", evict)

    job.wait(lambda seen: seen.status.attempt == 2 and seen.status.phase == "Running", "attempt 2 runs", 60)
    status = job.seen.status
    assert [(failure.reason, failure.pod) for failure in status.failures] == [("PodEvicted", victim)]
    assert (status.restarts, status.restarts_without_progress) == (1, 0)
