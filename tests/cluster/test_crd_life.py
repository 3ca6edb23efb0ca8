"""What a person meets at the API server: stored defaults, columns, short name, explain, the status subresource."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
import yaml
from api import BlockingApi
from constraints import minimal_job
from control_plane import Cluster, KubectlError

from pylon_api import names
from pylon_api.manifest import parse_job

pytestmark = pytest.mark.usefixtures("crd")

TEN_LINES = """\
apiVersion: pylon.dev/v1alpha1
kind: PylonJob
metadata: {name: quickstart}
spec:
  training:
    data: {train: ["python://stdlib/**/*.py"]}
    schedule: {steps: 600}
    gating: {strategy: GradientNorm, tokenRatio: 0.5}
    checkpoint: {uri: ./runs}
"""


def test_apply_stores_every_default(control_plane: Cluster, api: BlockingApi, namespace: str) -> None:
    control_plane.kubectl("apply", "--namespace", namespace, "--filename", "-", stdin=TEN_LINES)
    stored = api.get(f"/apis/{names.API_VERSION}/namespaces/{namespace}/{names.PLURAL}/quickstart")
    expected = parse_job(yaml.safe_load(TEN_LINES))
    assert stored["spec"] == expected.to_wire()["spec"]
    assert "status" not in stored


def test_columns_select_the_condition_by_type(control_plane: Cluster, namespace: str) -> None:
    control_plane.kubectl("apply", "--namespace", namespace, "--filename", "-", stdin=TEN_LINES)
    an_hour_ago = datetime.now(UTC) - timedelta(hours=1, minutes=1)
    condition = {"observedGeneration": 1, "lastTransitionTime": "2026-01-01T00:00:00Z", "message": ""}
    status = {
        "ready": "2/2",
        "restarts": 1,
        "gate": "0.50",
        "training": {"step": 120, "loss": 2.125, "tokensPerSecond": 5120.7},
        "checkpoint": {"step": 100, "uri": "./runs", "committedTime": an_hour_ago.isoformat()},
        "conditions": [
            {"type": "Succeeded", "status": "Unknown", "reason": "InProgress", **condition},
            {"type": "Running", "status": "True", "reason": "Training", **condition},
        ],
    }
    control_plane.kubectl(
        "patch", "pj", "quickstart", "--namespace", namespace, "--subresource=status", "--type=merge",
        "--patch", yaml.safe_dump({"status": status}),
    )  # fmt: skip
    show = ("get", "pj", "--namespace", namespace)
    header, row = control_plane.kubectl(*show).splitlines()
    assert header.split() == [
        "NAME", "SUCCEEDED", "REASON", "READY", "STEP", "LOSS", "TOKENS/S", "GATE", "CHECKPOINT", "RESTARTS", "AGE",
    ]  # fmt: skip
    assert row.split()[:-1] == [
        "quickstart", "Unknown", "InProgress", "2/2", "120", "2.125", "5120", "0.50", "100", "1",
    ]  # fmt: skip
    wide, row = control_plane.kubectl(*show, "--output", "wide").splitlines()
    assert wide.split()[-2:] == ["CHECKPOINT-AGE", "CHECKPOINT-URI"]
    assert row.split()[-2:] == ["61m", "./runs"]


def test_category_lists_jobs(control_plane: Cluster, namespace: str) -> None:
    control_plane.kubectl("apply", "--namespace", namespace, "--filename", "-", stdin=TEN_LINES)
    assert "quickstart" in control_plane.kubectl("get", "pylon", "--namespace", namespace)


def test_spec_cannot_be_changed_through_status(api: BlockingApi, namespace: str) -> None:
    path = f"/apis/{names.API_VERSION}/namespaces/{namespace}/{names.PLURAL}"
    job = minimal_job()
    job["metadata"]["namespace"] = namespace
    created = api.create(path, job)
    patched = api.patch(f"{path}/example/status", {"spec": {"suspend": True}, "status": {"attempt": 3}})
    assert patched["spec"] == created["spec"]
    assert patched["status"] == {"attempt": 3}
    assert patched["metadata"]["generation"] == created["metadata"]["generation"]


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("spec.failurePolicy.backoffSeconds", "in seconds"),
        ("spec.training.gating.strategy", "GradientNorm"),
        ("status.training.loss", "nats per token"),
        ("status.training.gate.savedFlopsRatio", "plain step's floating-point operations"),
    ],
)
def test_explain_prints_meaning_and_unit(control_plane: Cluster, field: str, said: str) -> None:
    assert said in control_plane.kubectl("explain", f"pj.{field}")


def test_kubectl_names_the_unknown_field(control_plane: Cluster, namespace: str) -> None:
    misspelt = TEN_LINES.replace("tokenRatio", "tokenRation")
    with pytest.raises(KubectlError, match=r'unknown field "spec\.training\.gating\.tokenRation"'):
        control_plane.kubectl("apply", "--namespace", namespace, "--filename", "-", stdin=misspelt)
