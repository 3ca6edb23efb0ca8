"""A PylonJob as its user handles it, for tests that watch one from outside."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import yaml
from api import BlockingApi
from control_plane import Cluster
from waiting import wait_for

from pylon_api import names
from pylon_api.job import PylonJob

Apply = Callable[..., "AppliedJob"]
"""The fixture `apply`: a manifest, and a namespace where it is not the test's own."""
START_SECONDS = 120
"""Long enough for a gang to import torch and make its first step on two busy cores."""


class AppliedJob:
    """One PylonJob: changed with kubectl, as a user would; looked at through the API, which is cheaper to repeat."""

    def __init__(self, cluster: Cluster, api: BlockingApi, namespace: str, manifest: dict[str, Any]) -> None:
        self._cluster = cluster
        self._api = api
        self.namespace = namespace
        self.name: str = manifest["metadata"]["name"]
        self._kubectl("apply", "-f", "-", stdin=yaml.safe_dump(manifest))

    def _kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        return self._cluster.kubectl("--namespace", self.namespace, *arguments, stdin=stdin)

    @property
    def seen(self) -> PylonJob:
        """The job as it now is."""
        path = f"/apis/{names.API_VERSION}/namespaces/{self.namespace}/{names.PLURAL}/{self.name}"
        return PylonJob.model_validate(self._api.get(path))

    def condition(self, kind: str) -> tuple[str, str, str]:
        """Status, reason and message."""
        for condition in self.seen.status.conditions:
            if condition.type == kind:
                return condition.status.value, condition.reason, condition.message
        return "", "", ""

    def children(self) -> list[str]:
        """Names of all objects that were made for it and still exist."""
        cores = [
            f"/api/v1/namespaces/{self.namespace}/{kind}" for kind in ("services", "configmaps", "secrets", "pods")
        ]
        paths = [*cores, f"/apis/batch/v1/namespaces/{self.namespace}/jobs"]
        found = [obj["metadata"]["name"] for path in paths for obj in self._api.list(path)]
        return [name for name in found if name.startswith(self.name)]

    def events(self) -> list[str]:
        """Reason of each Event on it."""
        found = self._api.list(f"/apis/events.k8s.io/v1/namespaces/{self.namespace}/events")
        return [event["reason"] for event in found if event["regarding"].get("name") == self.name]

    def batch_jobs(self) -> list[str]:
        """Names of its batch Jobs that are not on their way out."""
        found = self._api.list(f"/apis/batch/v1/namespaces/{self.namespace}/jobs")
        mine = [each["metadata"] for each in found if each["metadata"]["labels"].get(names.LABEL_JOB) == self.name]
        return sorted(metadata["name"] for metadata in mine if "deletionTimestamp" not in metadata)

    def wait_for_condition(self, kind: str, *wanted: str, timeout_seconds: float = 30) -> None:
        """`wanted`: the status, the reason, or a part of the message; all of them."""
        self.wait(
            lambda _: all(any(part in told for told in self.condition(kind)) for part in wanted),
            f"{kind} says {wanted}",
            timeout_seconds,
        )

    def patch(self, **spec: Any) -> None:
        self._kubectl("patch", "pylonjob", self.name, "--type=merge", "--patch", json.dumps({"spec": spec}))

    def delete(self) -> None:
        self._kubectl("delete", "pylonjob", self.name)

    def wait(self, condition: Callable[[PylonJob], Any], message: str, timeout_seconds: float = START_SECONDS) -> Any:
        try:
            return wait_for(lambda: condition(self.seen), timeout_seconds, f"{self.name}: {message}")
        except AssertionError as error:
            error.add_note(self._kubectl("get", "pylonjob,job,pod,event", "--output", "wide"))
            error.add_note(self._kubectl("get", "pylonjob", self.name, "--output", "yaml"))
            raise

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda job: job.status.training and job.status.training.step >= step, f"step {step}")

    def wait_for_commit(self) -> int:
        committed: int = self.wait(lambda job: job.status.checkpoint and job.status.checkpoint.step, "a commit")
        return committed
