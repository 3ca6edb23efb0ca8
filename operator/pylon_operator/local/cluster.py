"""A cluster of one machine and one job: Job controller, kubelet and API server in memory, over processes.

It implements the `Cluster` of `reconcile`, so attempts, the failure policy, restarts and suspension are the operator's
own plan. It decides nothing itself but what Kubernetes would: a Job fails with its first failed pod and its other pods
are then stopped; it completes when all of them have succeeded.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

import aiohttp
from pydantic import ValidationError

from pylon_api import names
from pylon_api.job import PylonJob, PylonJobStatus
from pylon_api.names import Reason
from pylon_api.run import TerminationReport, TrainerStatus
from pylon_operator import rank0
from pylon_operator.errors import Refused
from pylon_operator.local.gang import (
    ADDRESS,
    LocalAttempt,
    LocalPod,
    attempt_ended,
    by_name,
    free_ports,
    make_pod,
    recorded_attempt,
)
from pylon_operator.local.pods import PodRunner
from pylon_operator.local.state import JobDirectory
from pylon_operator.local.volumes import PodError
from pylon_operator.observation import (
    Action,
    AnnotateTopology,
    AttemptView,
    CreateAttempt,
    DeleteAttempt,
    DeleteJob,
    EmitEvent,
    ForceDeletePod,
    Observed,
    RequestCheckpoint,
)
from pylon_operator.resources import attempt_name, build_attempt, grace_seconds, token_for

POLL_SECONDS = 0.5
MISSED_POLLS = 3
"""Unanswered polls in a row after which rank 0 counts as silent."""


class LocalCluster:
    """Runs one job. Use it as a context: on leaving, whatever still runs is killed."""

    def __init__(
        self,
        job: PylonJob,
        directory: JobDirectory,
        runner: PodRunner,
        *,
        on_event: Callable[[EmitEvent], None],
    ) -> None:
        self.job = job
        self.report: TrainerStatus | None = None
        """Last that was heard of the trainer, also when it has gone since."""
        self.pods: list[LocalPod] = []
        """Of the current attempt, and those of earlier ones that have not ended."""
        self._directory = directory
        self._runner = runner
        self._on_event = on_event
        # A run that was cut short leaves its Job on record; the pods died with it.
        self._attempt = recorded_attempt(job)
        self._missed_polls = 0
        self._token_key = os.urandom(32)
        self._changed = asyncio.Event()
        self._watching = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession()
        await self._watching.__aenter__()
        self._polling = self._watching.create_task(self._poll())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._polling.cancel()
        for pod in self.pods:
            pod.process.kill()
        # Ends when every pod has, and raises what a watch of ours may have raised; `error` goes its own way.
        await self._watching.__aexit__(None, None, None)
        await self._session.close()

    # The Cluster protocol

    async def observe(self, namespace: str, name: str) -> Observed | None:
        """The one job, if it is the one asked for."""
        if (namespace, name) != (self.job.metadata.namespace, self.job.metadata.name):
            return None
        self._changed.clear()
        return Observed(
            job=self.job,
            attempts=(self._attempt.view,) if self._attempt else (),
            pods=tuple(pod.view() for pod in self.pods),
            trainer=self.report if self._missed_polls < MISSED_POLLS and self._speaks_now() else None,
        )

    async def apply(self, job: PylonJob, action: Action) -> None:
        """Does one action at once. Raises Refused when the pods cannot be started on this machine."""
        if not isinstance(action, EmitEvent | RequestCheckpoint):
            self._changed.set()  # as the watch event that follows a write
        match action:
            case CreateAttempt(attempt):
                self._create(job, attempt)
            case DeleteAttempt(_, uid):
                if self._attempt and self._attempt.view.uid == uid:
                    self._delete(self._attempt, grace_seconds(job.spec))
            case ForceDeletePod(_, uid):
                for pod in self._find(uid):
                    pod.process.kill()
            case AnnotateTopology(_, uid, node):
                # No node labels here: each level is unknown, and the node is this machine.
                domains = json.dumps(["" for _ in job.spec.topology.levels] + [node])
                for pod in self._find(uid):
                    pod.process.update_annotations({names.ANNOTATION_TOPOLOGY: domains})
            case RequestCheckpoint():
                if self._attempt:
                    token = token_for(self._token_key, job.metadata.uid)
                    await rank0.request_checkpoint(self._session, ADDRESS, self._attempt.status_port, token)
            case EmitEvent():
                self._on_event(action)
            case DeleteJob():
                pass  # a finished run ends by itself, and what it leaves belongs to the user

    async def write_status(self, job: PylonJob, status: PylonJobStatus) -> None:  # noqa: ARG002  there is one job
        """Keeps the status, in memory and on disk."""
        self.job = self.job.model_copy(update={"status": status})
        self._directory.save(self.job)

    # For whoever runs the job

    def set_suspend(self, suspend: bool) -> None:
        """What `kubectl patch` of spec.suspend does."""
        metadata = self.job.metadata.model_copy(update={"generation": self.job.metadata.generation + 1})
        spec = self.job.spec.model_copy(update={"suspend": suspend})
        self.job = self.job.model_copy(update={"metadata": metadata, "spec": spec})
        self._changed.set()

    async def wait(self, timeout_seconds: float | None) -> None:
        """Until something has happened since the last `observe`, or the time is over."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_seconds)

    # Job controller and kubelet

    def _create(self, job: PylonJob, attempt: int) -> None:
        if self._attempt and self._attempt.view.attempt == attempt:
            return
        token = token_for(self._token_key, job.metadata.uid)
        objects = build_attempt(job, attempt, default_image="local", token=token)
        config_maps, secrets = by_name(objects, "ConfigMap"), by_name(objects, "Secret")
        batch_job = objects[-1]
        name = attempt_name(job.metadata.name, attempt)
        hosts = {f"{name}-{index}.{name}": ADDRESS for index in range(job.spec.nodes)}
        rendezvous_port, *status_ports = free_ports(1 + job.spec.nodes)
        view = AttemptView(name, str(uuid.uuid4()), attempt)
        self._attempt = LocalAttempt(view, status_ports[0])
        self._missed_polls = 0
        try:
            for index, status_port in enumerate(status_ports):
                process = self._runner.start(
                    make_pod(batch_job, index, secrets),
                    config_maps=config_maps,
                    secrets=secrets,
                    address=ADDRESS,
                    hosts=hosts,
                    ports={names.PORT_RENDEZVOUS: rendezvous_port, names.PORT_STATUS: status_port},
                )
                pod = LocalPod(process, view.uid, attempt, index)
                self._attempt.pods.append(pod)
                self.pods.append(pod)
                self._watching.create_task(self._watch(pod, self._attempt, grace_seconds(job.spec)))
        except PodError as error:
            self._delete(self._attempt, grace=0)
            raise Refused(Reason.INVALID_SPEC, str(error)) from error

    def _delete(self, attempt: LocalAttempt, grace: float) -> None:
        self._attempt = None
        for pod in attempt.pods:
            pod.stop(grace)
        self.pods = [pod for pod in self.pods if pod.exit_code is None]

    async def _watch(self, pod: LocalPod, attempt: LocalAttempt, grace: float) -> None:
        code = await pod.process.wait()
        pod.exit_code, pod.finished_time = code, datetime.now(UTC)
        if pod.index == 0:
            self._take_last_words(pod)
        if self._attempt is not attempt:
            self.pods.remove(pod)
        elif code:
            attempt.view = attempt_ended(attempt.view, failed=True)
            for other in attempt.pods:
                other.stop(grace)
        elif all(each.exit_code == 0 for each in attempt.pods):
            attempt.view = attempt_ended(attempt.view, failed=False)
        self._changed.set()

    def _take_last_words(self, pod: LocalPod) -> None:
        with contextlib.suppress(ValidationError):
            final = TerminationReport.model_validate_json(pod.process.termination_message()).final
            self.report = final or self.report

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            attempt = self._attempt
            if attempt is None or not attempt.pods or attempt.pods[0].exit_code is not None:
                continue
            report = await rank0.get_status(self._session, ADDRESS, attempt.status_port)
            if report is None or report.uid != self.job.metadata.uid or report.attempt != attempt.view.attempt:
                self._missed_polls += 1
                if self._missed_polls == MISSED_POLLS:
                    self._changed.set()
            elif attempt is self._attempt:
                self._missed_polls = 0
                if report != self.report:
                    self.report = report
                    self._changed.set()

    def _speaks_now(self) -> bool:
        return bool(self.report and self._attempt and self.report.attempt == self._attempt.view.attempt)

    def _find(self, uid: str) -> list[LocalPod]:
        return [pod for pod in self.pods if pod.uid == uid and pod.exit_code is None]
