"""The pods of one attempt: what an Indexed Job makes of its template, and what a kubelet would report of each."""

from __future__ import annotations

import contextlib
import platform
import socket
import uuid
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from pylon_api import names
from pylon_api.job import PylonJob
from pylon_operator.local.pods import PodProcess
from pylon_operator.observation import AttemptView, PodView
from pylon_operator.resources import attempt_name

Object = dict[str, Any]

ADDRESS = "127.0.0.1"
"""Of every pod: macOS has no other loopback address, so pods differ by their ports instead."""


@dataclass(eq=False)
class LocalPod:
    """One pod with what a kubelet would report of it."""

    process: PodProcess
    job_uid: str
    attempt: int
    index: int
    uid: str = field(default_factory=lambda: str(uuid.uuid4()))
    exit_code: int | None = None
    finished_time: datetime | None = None
    deletion_time: datetime | None = None

    @property
    def name(self) -> str:
        """metadata.name."""
        return str(self.process.pod["metadata"]["name"])

    def stop(self, grace: float) -> None:
        """What deleting the pod does: SIGTERM, and SIGKILL after the grace."""
        if self.exit_code is None and self.deletion_time is None:
            self.deletion_time = datetime.now(UTC) + timedelta(seconds=grace)
            self.process.terminate(grace)

    def view(self) -> PodView:
        """What the plan may know of it."""
        ended = self.exit_code is not None
        return PodView(
            name=self.name,
            uid=self.uid,
            attempt=self.attempt,
            index=self.index,
            job_uid=self.job_uid,
            phase="Running" if not ended else "Failed" if self.exit_code else "Succeeded",
            ready=not ended,
            node=platform.node(),
            ip=ADDRESS,
            exit_code=self.exit_code,
            reason="Error" if self.exit_code else None,
            message=self.process.termination_message() if ended else "",
            finished_time=self.finished_time,
            deletion_time=self.deletion_time,
            topology=self.process.pod["metadata"].get("annotations", {}).get(names.ANNOTATION_TOPOLOGY),
        )


@dataclass
class LocalAttempt:
    """One batch Job with its pods."""

    view: AttemptView
    status_port: int = 0
    pods: list[LocalPod] = field(default_factory=list)


def recorded_attempt(job: PylonJob) -> LocalAttempt | None:
    """The attempt that the job's status says is running, without its pods."""
    status = job.status
    if status.attempt_job_uid is None or status.completion_time:
        return None
    return LocalAttempt(
        AttemptView(attempt_name(job.metadata.name, status.attempt), status.attempt_job_uid, status.attempt)
    )


def by_name(objects: list[Object], kind: str) -> dict[str, Object]:
    """The objects of one kind by their names."""
    return {each["metadata"]["name"]: each for each in objects if each["kind"] == kind}


def attempt_ended(view: AttemptView, *, failed: bool) -> AttemptView:
    """The batch Job with the condition that its pods' ends give it."""
    reason = "BackoffLimitExceeded" if failed else "CompletionsReached"
    return AttemptView(view.name, view.uid, view.attempt, complete=not failed, failed=failed, reason=reason)


def make_pod(batch_job: Object, index: int, secrets: dict[str, Object]) -> Object:
    """Pod `index` of an Indexed Job. Secrets that only the cluster has become optional: locally, this shell's own
    environment and home directory hold the credentials."""
    name, template = batch_job["metadata"]["name"], deepcopy(batch_job["spec"]["template"])
    metadata = template.get("metadata", {})
    own = {names.LABEL_COMPLETION_INDEX: str(index), names.LABEL_BATCH_JOB: name}
    for container in template["spec"]["containers"]:
        for source in container.get("envFrom", []) + [each.get("valueFrom", {}) for each in container.get("env", [])]:
            reference = source.get("secretRef") or source.get("secretKeyRef")
            if reference and reference["name"] not in secrets:
                reference["optional"] = True
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            **metadata,
            "name": f"{name}-{index}",
            "namespace": batch_job["metadata"]["namespace"],
            "labels": metadata.get("labels", {}) | own,
        },
        "spec": template["spec"],
    }


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, all different."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((ADDRESS, 0))
        return [int(each.getsockname()[1]) for each in sockets]
