"""A real Kubernetes for tests: one control plane per test run, a namespace and emulated nodes per test.

Pods on emulated nodes are run by the same code as those of `pylon run`.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from api import Api, Background, BlockingApi
from applied_job import AppliedJob, Apply
from control_plane import Cluster, existing_cluster
from control_plane import control_plane as start_control_plane
from nodes import Nodes
from pod_life import PodRunner
from programs import ProgramsError
from waiting import wait_for

from pylon_api import names
from pylon_api.crd import build_crd
from pylon_operator.local.pods import PodRunner as ProcessRunner

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kubeconfig", type=Path, help="run tests/cluster against this cluster, not one of their own")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session", name="control_plane")
def _control_plane(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The cluster: kubeconfig, `kubectl(...)`, kubeconfigs of ServiceAccounts."""
    kubeconfig = request.config.getoption("--kubeconfig", None) or os.environ.get("PYLON_KUBECONFIG")
    if kubeconfig:
        yield existing_cluster(Path(kubeconfig))
        return
    try:
        context = start_control_plane()
        cluster = context.__enter__()
    except ProgramsError as error:
        if os.environ.get("PYLON_REQUIRE_CLUSTER") == "1":
            pytest.fail(f"no control plane: {error}", pytrace=False)
        pytest.skip(f"no control plane: {error}")
    yield cluster
    context.__exit__(None, None, None)


@pytest.fixture(scope="session")
def api(control_plane: Cluster) -> Iterator[BlockingApi]:
    """Plain JSON requests to the API server, as the administrator."""
    background, client = Background(), Api(control_plane.kubeconfig)
    background.call(client.__aenter__())
    yield BlockingApi(client, background)
    background.call(client.__aexit__(None, None, None))
    background.close()


@pytest.fixture
def namespace(api: BlockingApi) -> Iterator[str]:
    """A namespace of the test's own, with the ServiceAccount that pods need."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    api.create("/api/v1/namespaces", {"metadata": {"name": name}})
    accounts = f"/api/v1/namespaces/{name}/serviceaccounts"
    wait_for(lambda: api.list(accounts), message=f"namespace {name} has its ServiceAccount")
    yield name
    api.delete(f"/api/v1/namespaces/{name}")


@pytest.fixture(scope="session")
def crd(control_plane: Cluster) -> None:
    """The PylonJob CRD, applied and served."""
    control_plane.apply(build_crd())
    control_plane.kubectl("wait", "--for=condition=Established", f"crd/{names.PLURAL}.{names.GROUP}", "--timeout=30s")


@pytest.fixture
def apply(control_plane: Cluster, api: BlockingApi, namespace: str) -> Apply:
    """Applies a PylonJob as its user would, and gives a handle on it."""
    return lambda manifest, place=namespace: AppliedJob(control_plane, api, place, manifest)


@pytest.fixture
def pod_runner(tmp_path: Path) -> PodRunner:
    """How emulated nodes run pods; a module may have its own."""
    return ProcessRunner(logs=tmp_path / "logs")


@pytest.fixture
def nodes(control_plane: Cluster, pod_runner: PodRunner) -> Iterator[Nodes]:
    """Emulated nodes, none at first; `nodes.add("node-0", gpus=8, labels=...)` registers one."""
    if not control_plane.is_emulated:
        pytest.skip("pods run as processes only on a control plane of our own, and this one was given by --kubeconfig")
    with Nodes(control_plane.kubeconfig, pod_runner) as emulated:
        yield emulated
