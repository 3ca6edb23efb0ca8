"""The operator against a real API server where the server, other users and other operators get in its way.

It runs under roles made from its own table of permissions, so that the table is proven to be enough.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from api import BlockingApi
from control_plane import Cluster, KubectlError
from operator_process import IMAGE, ROOT, OperatorProcess
from operator_roles import granted, roles, running_operator
from waiting import wait_for

from pylon_api import names
from pylon_operator.permissions import CLUSTER, WORKLOADS

pytestmark = pytest.mark.usefixtures("crd")

HOME = "pylon-edges"
JOBS = "/apis/batch/v1/namespaces/{}/jobs"
PYLON_JOBS = f"/apis/{names.API_VERSION}/namespaces/{{}}/{names.PLURAL}"


@pytest.fixture(scope="module")
def operator(
    control_plane: Cluster, api: BlockingApi, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OperatorProcess]:
    with running_operator(control_plane, api, HOME, tmp_path_factory.mktemp("operator")) as running:
        yield running


@pytest.fixture
def make(api: BlockingApi, namespace: str) -> Callable[..., None]:
    """Creates a PylonJob whose pods stay pending, since there is no node for them."""

    def make(name: str, namespace: str = namespace, **spec: Any) -> None:
        training = {"data": {"train": ["/data/*.txt"]}, "schedule": {"steps": 1}}
        manifest = {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "metadata": {"name": name},
            "spec": {"nodes": 2, "training": training} | spec,
        }
        api.create(PYLON_JOBS.format(namespace), manifest)

    return make


def condition(api: BlockingApi, namespace: str, name: str, kind: str) -> tuple[str, str, str]:
    status = api.get(f"{PYLON_JOBS.format(namespace)}/{name}").get("status") or {}
    found = next((c for c in status.get("conditions") or [] if c["type"] == kind), {})
    return found.get("status", ""), found.get("reason", ""), found.get("message", "")


def test_an_operator_killed_again_and_again_doubles_nothing(
    operator: OperatorProcess, api: BlockingApi, namespace: str, make: Callable[..., None], control_plane: Cluster
) -> None:
    wanted = {f"job-{number}-a1" for number in range(12)}
    seen: dict[str, str] = {}

    def note() -> int:
        for job in api.list(JOBS.format(namespace)):
            metadata = job["metadata"]
            assert seen.setdefault(metadata["name"], metadata["uid"]) == metadata["uid"], "a Job was made anew"
        return len(seen)

    for number in range(12):
        make(f"job-{number}")
    for enough in (2, 6):
        wait_for(lambda enough=enough: note() >= enough, 60, f"{enough} Jobs")
        operator.kill()
        control_plane.kubectl("delete", "lease", "pylon-operator", "--namespace", HOME)  # not to wait for its end
        operator.start()
    wait_for(lambda: note() == 12, 60, "all Jobs")
    assert set(seen) == wanted
    for number in range(12):
        attempt = api.get(f"{PYLON_JOBS.format(namespace)}/job-{number}")["status"]["attempt"]
        assert attempt == 1


def test_a_strangers_service_is_named_and_survives(
    operator: OperatorProcess, api: BlockingApi, namespace: str, make: Callable[..., None], control_plane: Cluster
) -> None:
    services = f"/api/v1/namespaces/{namespace}/services"
    api.create(services, {"metadata": {"name": "mine-a1"}, "spec": {"clusterIP": "None", "selector": {"app": "x"}}})
    make("mine")
    wait_for(lambda: condition(api, namespace, "mine", "Running")[1] == "Forbidden", 30, "it is shown")
    assert "mine-a1 exists and is not this job's" in condition(api, namespace, "mine", "Running")[2]
    theirs = api.get(f"{services}/mine-a1")
    assert "ownerReferences" not in theirs["metadata"]
    assert theirs["spec"]["selector"] == {"app": "x"}
    api.delete(f"{services}/mine-a1")
    control_plane.kubectl("annotate", "pylonjob", "mine", "look=again", "--namespace", namespace)
    wait_for(lambda: api.list(JOBS.format(namespace)), 30, "it goes on")


def test_an_edited_job_is_put_right_and_others_fields_stay(
    operator: OperatorProcess, api: BlockingApi, namespace: str, make: Callable[..., None]
) -> None:
    make("edited")
    job = f"{JOBS.format(namespace)}/edited-a1"
    wait_for(lambda: api.list(JOBS.format(namespace)), 30, "the Job")
    api.patch(job, {"spec": {"parallelism": 1, "suspend": True}, "metadata": {"labels": {"theirs": "yes"}}})
    wait_for(lambda: api.get(job)["spec"]["parallelism"] == 2, 30, "parallelism is put back")
    assert api.get(job)["spec"]["suspend"] is True
    assert api.get(job)["metadata"]["labels"]["theirs"] == "yes"


def test_a_template_that_the_api_server_refuses_ends_the_job_in_its_words(
    operator: OperatorProcess, api: BlockingApi, namespace: str, make: Callable[..., None]
) -> None:
    make("refused", template={"spec": {"containers": [{"name": "trainer", "imagePullPolicy": "Sometimes"}]}})
    wait_for(lambda: condition(api, namespace, "refused", "Succeeded")[0] == "False", 30, "it ends")
    _, reason, message = condition(api, namespace, "refused", "Succeeded")
    assert reason == "InvalidSpec"
    assert 'Unsupported value: "Sometimes"' in message


def test_a_second_operator_takes_over_when_the_first_stops(
    operator: OperatorProcess,
    tmp_path: Path,
    api: BlockingApi,
    namespace: str,
    make: Callable[..., None],
) -> None:
    lease = f"/apis/coordination.k8s.io/v1/namespaces/{HOME}/leases/pylon-operator"
    second = OperatorProcess(operator.kubeconfig, HOME, tmp_path / "second.log")
    try:
        second.start()
        holder = api.get(lease)["spec"]["holderIdentity"]
        operator.stop()
        wait_for(lambda: api.get(lease)["spec"]["holderIdentity"] not in ("", holder), 10, "the second one leads")
        make("late")
        wait_for(lambda: api.list(JOBS.format(namespace)), 30, "the Job")
    finally:
        second.stop()
        operator.start()


def test_a_missing_permission_is_one_line_with_the_rule(
    operator: OperatorProcess, control_plane: Cluster, tmp_path: Path
) -> None:
    rules = tuple(rule for rule in WORKLOADS if rule.resource != "configmaps")
    with granted(control_plane, roles(HOME, "too-little", rules + CLUSTER)):
        kubeconfig = control_plane.kubeconfig_for(HOME, "too-little", tmp_path / "kubeconfig")
        command = (sys.executable, "-m", "pylon_operator.cli", "operator", "--kubeconfig", str(kubeconfig))
        done = subprocess.run(
            [*command, "--image", IMAGE, "--lease-namespace", HOME, "--health-port", "0", "--metrics-port", "0"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=60,
        )
    assert done.returncode == 77
    assert len(done.stderr.splitlines()) == 1
    assert 'configmaps (add the rule {apiGroups: [\\"\\"], resources: [\\"configmaps\\"]' in done.stderr


def test_a_namespace_goes_with_all_that_is_in_it(
    operator: OperatorProcess, api: BlockingApi, control_plane: Cluster, make: Callable[..., None]
) -> None:
    api.create("/api/v1/namespaces", {"metadata": {"name": "doomed"}})
    # The namespace controller deletes pods first and comes back after half of their grace period.
    make("last", namespace="doomed", checkpointTimeoutSeconds=0)
    wait_for(lambda: api.list(JOBS.format("doomed")), 30, "the Job")
    control_plane.kubectl("delete", "namespace", "doomed", "--timeout", "60s")
    with pytest.raises(KubectlError, match="not found"):
        control_plane.kubectl("get", "namespace", "doomed")
