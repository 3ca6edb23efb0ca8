"""What is kept of Kubernetes' own objects."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from pylon_api import names
from pylon_operator.views import attempt_view, pod_view


def a_pod(status: dict[str, Any], **metadata: Any) -> dict[str, Any]:
    labels = {names.LABEL_ATTEMPT: "3", names.LABEL_COMPLETION_INDEX: "11"}
    owner = {"kind": "Job", "uid": "job-uid"}
    return {
        "metadata": {"name": "p", "uid": "u", "labels": labels, "ownerReferences": [owner]} | metadata,
        "spec": {"nodeName": "n1"},
        "status": status,
    }


def ended(exit_code: int, reason: str, message: str = "") -> dict[str, Any]:
    state = {"exitCode": exit_code, "reason": reason, "message": message, "finishedAt": "2026-03-01T12:00:00Z"}
    return {
        "containerStatuses": [
            {"name": "sidecar", "state": {"terminated": {"exitCode": 0, "reason": "Completed"}}},
            {"name": names.CONTAINER, "state": {"terminated": state}},
        ]
    }


def condition(kind: str, status: str, **more: str) -> dict[str, Any]:
    return {"type": kind, "status": status, **more}


def test_a_running_pod() -> None:
    status = {"phase": "Running", "podIP": "10.0.0.7", "conditions": [condition("Ready", "True")]}
    annotations = {names.ANNOTATION_TOPOLOGY: '["z"]'}
    view = pod_view(a_pod(status, annotations=annotations, deletionTimestamp="2026-03-01T12:00:30Z"))
    assert (view.name, view.uid, view.attempt, view.index, view.job_uid) == ("p", "u", 3, 11, "job-uid")
    assert (view.phase, view.ready, view.node, view.ip) == ("Running", True, "n1", "10.0.0.7")
    assert (view.exit_code, view.reason, view.topology) == (None, None, '["z"]')
    assert view.deletion_time == datetime(2026, 3, 1, 12, 0, 30, tzinfo=UTC)


def test_a_pod_that_nobody_has_looked_at_yet() -> None:
    view = pod_view({"metadata": {"name": "p", "uid": "u"}})
    assert (view.phase, view.ready, view.node, view.attempt, view.index, view.job_uid) == (
        "Pending",
        False,
        None,
        0,
        0,
        "",
    )


@pytest.mark.parametrize(
    ("status", "reason", "message"),
    [
        (ended(1, "Error", "bad data"), "Error", "bad data"),
        (ended(137, "OOMKilled"), "OOMKilled", ""),
        ({"reason": "Evicted", "message": "low on memory", **ended(137, "Error")}, "Evicted", "low on memory"),
        (
            {"conditions": [condition("DisruptionTarget", "True", reason="PreemptionByScheduler", message="by x")]},
            "Preempted",
            "by x",
        ),
        ({"conditions": [condition("DisruptionTarget", "True", reason="EvictionByEvictionAPI")]}, "Evicted", ""),
        ({"conditions": [condition("DisruptionTarget", "True", reason="DeletionByTaintManager")]}, "NodeLost", ""),
        (
            {"conditions": [condition("PodScheduled", "False", reason="Unschedulable", message="no GPUs")]},
            "Unschedulable",
            "no GPUs",
        ),
        (
            {"containerStatuses": [{"name": "trainer", "state": {"waiting": {"reason": "ImagePullBackOff"}}}]},
            "ImagePullBackOff",
            "",
        ),
    ],
)
def test_why_a_pod_is_as_it_is(status: dict[str, Any], reason: str, message: str) -> None:
    view = pod_view(a_pod(status))
    assert (view.reason, view.message) == (reason, message)


def test_the_exit_is_that_of_the_trainers_container() -> None:
    view = pod_view(a_pod({"phase": "Failed", **ended(76, "Error")}))
    assert view.exit_code == 76
    assert view.finished_time == datetime(2026, 3, 1, 12, tzinfo=UTC)
    assert view.terminal


def a_batch_job(spec: dict[str, Any] | None = None, conditions: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {
        "metadata": {"name": "demo-a3", "uid": "u", "labels": {names.LABEL_ATTEMPT: "3"}},
        "spec": {"parallelism": 4, "completions": 4, "backoffLimit": 0} | (spec or {}),
        "status": {"conditions": conditions or []},
    }


@pytest.mark.parametrize(
    ("conditions", "complete", "failed", "reason"),
    [
        ([], False, False, ""),
        ([condition("Complete", "True")], True, False, ""),
        ([condition("FailureTarget", "True", reason="BackoffLimitExceeded")], False, True, "BackoffLimitExceeded"),
        ([condition("Failed", "True", reason="DeadlineExceeded")], False, True, "DeadlineExceeded"),
    ],
)
def test_how_an_attempt_stands(conditions: list[dict[str, Any]], complete: bool, failed: bool, reason: str) -> None:
    view, pods = attempt_view(a_batch_job(conditions=conditions))
    assert (view.attempt, view.complete, view.failed, view.reason, pods) == (3, complete, failed, reason, 4)


@pytest.mark.parametrize(
    ("spec", "edited"),
    [({}, False), ({"suspend": True}, False), ({"parallelism": 0}, True), ({"backoffLimit": 6}, True)],
)
def test_only_our_own_fields_count_as_edited(spec: dict[str, Any], edited: bool) -> None:
    assert attempt_view(a_batch_job(spec))[0].edited is edited
