"""Reads Kubernetes' own objects into the few fields that decisions need. Pure; a missing field is never an error."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pylon_api import names
from pylon_operator.observation import AttemptView, PodView

JsonObject = dict[str, Any]

# Reasons of the DisruptionTarget condition, as people and failure rules know them:
# https://kubernetes.io/docs/concepts/workloads/pods/disruptions/#pod-disruption-conditions
DISRUPTIONS = {
    "PreemptionByScheduler": "Preempted",
    "EvictionByEvictionAPI": "Evicted",
    "TerminationByKubelet": "Evicted",
    "DeletionByTaintManager": "NodeLost",
    "DeletionByPodGC": "NodeLost",
}


def pod_view(pod: JsonObject) -> PodView:
    """One pod of a gang, from a v1 Pod."""
    metadata, status = pod["metadata"], pod.get("status") or {}
    labels = metadata.get("labels") or {}
    trainer = _trainer_state(status)
    ended = trainer.get("terminated") or {}
    reason, message = _reason_and_message(status, trainer)
    return PodView(
        name=metadata["name"],
        uid=metadata["uid"],
        attempt=_number(labels.get(names.LABEL_ATTEMPT)),
        index=_number(labels.get(names.LABEL_COMPLETION_INDEX)),
        job_uid=next((o["uid"] for o in metadata.get("ownerReferences") or [] if o["kind"] == "Job"), ""),
        phase=status.get("phase") or "Pending",
        ready=_condition(status, "Ready").get("status") == "True",
        node=(pod.get("spec") or {}).get("nodeName"),
        ip=status.get("podIP"),
        exit_code=ended.get("exitCode"),
        reason=reason,
        message=message,
        finished_time=_time(ended.get("finishedAt")),
        deletion_time=_time(metadata.get("deletionTimestamp")),
        topology=(metadata.get("annotations") or {}).get(names.ANNOTATION_TOPOLOGY),
    )


def attempt_view(job: JsonObject) -> tuple[AttemptView, int]:
    """One attempt and the number of pods that it asks for, from a batch/v1 Job.

    Only the fields that we own and that the API server lets others change can have been edited.
    """
    metadata, spec, status = job["metadata"], job["spec"], job.get("status") or {}
    failure = next((c for c in (_condition(status, kind) for kind in ("Failed", "FailureTarget")) if c), {})
    completions = spec.get("completions") or 0
    view = AttemptView(
        name=metadata["name"],
        uid=metadata["uid"],
        attempt=_number((metadata.get("labels") or {}).get(names.LABEL_ATTEMPT)),
        complete=_condition(status, "Complete").get("status") == "True",
        failed=failure.get("status") == "True",
        reason=failure.get("reason") or "",
        deleting="deletionTimestamp" in metadata,
        edited=spec.get("parallelism") != completions or spec.get("backoffLimit") != 0,
        creation_time=_time(metadata.get("creationTimestamp")),
    )
    return view, completions


def _trainer_state(status: JsonObject) -> JsonObject:
    containers = status.get("containerStatuses") or []
    return next((c.get("state") or {} for c in containers if c["name"] == names.CONTAINER), {})


def _reason_and_message(status: JsonObject, trainer: JsonObject) -> tuple[str | None, str]:
    """The pod's own reason explains more than its container's: an evicted pod's container just ends with an Error."""
    ended, waiting = trainer.get("terminated") or {}, trainer.get("waiting") or {}
    disruption, scheduled = _condition(status, "DisruptionTarget"), _condition(status, "PodScheduled")
    told = DISRUPTIONS.get(disruption.get("reason", ""), disruption.get("reason"))
    unscheduled = scheduled if scheduled.get("status") == "False" else {}
    reason = status.get("reason") or told or ended.get("reason") or waiting.get("reason") or unscheduled.get("reason")
    message = (
        ended.get("message")
        or status.get("message")
        or disruption.get("message")
        or waiting.get("message")
        or unscheduled.get("message")
        or ""
    )
    return reason, message


def _condition(status: JsonObject, kind: str) -> JsonObject:
    return next((c for c in status.get("conditions") or [] if c["type"] == kind), {})


def _number(label: str | None) -> int:
    return int(label) if label is not None and label.isdigit() else 0


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
