"""A cluster in memory on a fake clock: API server, Job controller, kubelets and a trainer, as `reconcile` sees them.

It may kill the operator before any one write, which is also after the write before it: a reconcile keeps nothing in
memory. It checks after every write and every tick what must hold at all times: never two live gangs, no attempt number
skipped or used twice, no pod without its configuration.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from operator_builders import NOW, UID, a_checkpoint, a_report

from pylon_api.job import PylonJob, PylonJobStatus
from pylon_api.names import ExitCode
from pylon_api.run import TrainerPhase, TrainerStatus
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
    PodView,
    RequestCheckpoint,
)
from pylon_operator.reconcile import reconcile

TICK_SECONDS = 5
STEPS_PER_TICK = 10
TICKS_TO_DIE = 2
"""A pod that was told to end still runs for so long."""


class OperatorKilled(Exception):
    """The operator's process ends here."""


@dataclass(frozen=True)
class Death:
    """One pod of an attempt ends by itself once training has reached `step`."""

    step: int
    exit_code: int = ExitCode.INTERNAL
    pod: int = 1
    message: str = "boom"


@dataclass
class Gang:
    """One batch Job with its pods."""

    view: AttemptView
    pods: dict[int, PodView]
    step: int = 0
    dying: dict[int, int] = field(default_factory=dict)
    """Ticks left of pods that were told to end."""


@dataclass
class SimulatedCluster:
    job: PylonJob
    deaths: dict[int, Death] = field(default_factory=dict)
    """By attempt."""
    dead_nodes: set[str] = field(default_factory=set)
    """Nodes that confirm nothing any more."""
    interval_steps: int = 50
    kill_before_write: int | None = None
    """Number of the write, from 0."""
    commits_on_request: bool = True

    now: datetime = NOW
    writes: int = 0
    gangs: list[Gang] = field(default_factory=list)
    children: dict[int, set[str]] = field(default_factory=dict)
    events: list[EmitEvent] = field(default_factory=list)
    created: list[int] = field(default_factory=list)
    """Attempts for which a Job was made, in order."""
    recorded: set[int] = field(default_factory=set)
    """Attempts whose Job has been on record."""
    committed: int = 0
    requested: bool = False
    deleted: bool = False
    saw_record_before_ttl: bool = False
    _uids: Any = field(default_factory=lambda: itertools.count(1))

    # What the operator sees and does.

    async def observe(self, namespace: str, name: str) -> Observed | None:
        if self.deleted:
            return None
        attempt = self.job.status.attempt
        current = [g for g in self.gangs if g.view.attempt == attempt]
        missing = {"Service", "ConfigMap"} - self.children.get(attempt, set()) if current else set()
        return Observed(
            self.job,
            tuple(gang.view for gang in self.gangs if gang.view.name),
            tuple(pod for gang in self.gangs for pod in gang.pods.values()),
            self._status_of(current[0]) if current else None,
            missing_children=frozenset(missing),
        )

    async def apply(self, job: PylonJob, action: Action) -> None:
        match action:
            case CreateAttempt(attempt):
                for kind in ("Service", "ConfigMap", "Secret"):
                    self._write(lambda kind=kind: self.children.setdefault(attempt, set()).add(kind))
                self._write(lambda: self._create_gang(attempt))
            case DeleteAttempt(name, uid):
                self._write(lambda: self.delete_batch_job(name, uid))
            case ForceDeletePod(_, uid):
                self._write(lambda: self._remove_pod(uid))
            case AnnotateTopology(_, uid, node):
                self._write(lambda: self._update_pod(uid, topology=f'["{node}"]'))
            case RequestCheckpoint():
                self._write(lambda: setattr(self, "requested", True))
            case DeleteJob(uid):
                assert uid == self.job.metadata.uid
                self._write(self._delete_pylon_job)
            case EmitEvent():
                self._write(lambda: self.events.append(action))

    async def write_status(self, job: PylonJob, status: PylonJobStatus) -> None:
        assert job.metadata.resource_version == self.job.metadata.resource_version, "a stale write"

        def write() -> None:
            # Through JSON, as over the wire: what does not survive it is lost.
            stored = PylonJobStatus.model_validate_json(status.model_dump_json(by_alias=True))
            assert stored == status
            if stored.attempt_job_uid:
                self.recorded.add(stored.attempt)
            version = str(int(self.job.metadata.resource_version or "0") + 1)
            metadata = self.job.metadata.model_copy(update={"resource_version": version})
            self.job = self.job.model_copy(update={"status": stored, "metadata": metadata})

        self._write(write)

    # What people and nodes do.

    def edit(self, **spec: Any) -> None:
        """kubectl edit."""
        metadata = self.job.metadata.model_copy(update={"generation": self.job.metadata.generation + 1})
        changed = self.job.spec.model_copy(update=spec)
        self.job = self.job.model_copy(update={"spec": changed, "metadata": metadata})

    def delete_batch_job(self, name: str, uid: str | None = None) -> None:
        """The Job goes at once, its pods when their processes have ended."""
        for gang in self.gangs:
            if gang.view.name == name and uid in (None, gang.view.uid):
                gang.view = replace(gang.view, name="")
                self._terminate(gang)

    def lose_node(self, node: str) -> None:
        """A node dies: its pods are told to go and never confirm it."""
        self.dead_nodes.add(node)
        for gang in self.gangs:
            for index, pod in gang.pods.items():
                if pod.node == node:
                    gang.dying[index] = TICKS_TO_DIE
                    gang.pods[index] = replace(pod, deletion_time=self.now)

    def tick(self) -> None:
        """Let TICK_SECONDS pass for nodes, trainers and the Job controller."""
        self.now += timedelta(seconds=TICK_SECONDS)
        for gang in self.gangs:
            self._train(gang)
            self._end_dying(gang)
            self._control(gang)
        self.gangs = [gang for gang in self.gangs if gang.view.name or gang.pods]
        self.check()

    def check(self) -> None:
        """What must hold at all times."""
        live = {pod.job_uid for gang in self.gangs for pod in gang.pods.values() if not pod.terminal}
        assert len(live) <= 1, f"two live gangs: {live}"
        numbers = sorted(set(self.created))
        assert numbers == list(range(1, len(numbers) + 1)), f"attempts created: {self.created}"
        for gang in self.gangs:
            if gang.view.name:
                missing = {"Service", "ConfigMap", "Secret"} - self.children[gang.view.attempt]
                assert not missing or gang.step, f"a Job before its {missing}"
                assert gang.view.attempt <= self.job.status.attempt, "created before its number was on record"

    def _write(self, change: Callable[[], Any]) -> None:
        number, self.writes = self.writes, self.writes + 1
        if number == self.kill_before_write:
            raise OperatorKilled
        change()
        self.check()

    def _create_gang(self, attempt: int) -> None:
        name = f"{self.job.metadata.name}-a{attempt}"
        if any(gang.view.name == name for gang in self.gangs):
            return
        # A Job that was deleted before it was ever on record leaves its number free.
        assert attempt not in self.recorded, f"attempt {attempt} is made twice"
        uid = f"job-{next(self._uids)}"
        self.created.append(attempt)
        pods = {
            index: PodView(f"{name}-{index}", f"{uid}-{index}", attempt, index, uid)
            for index in range(self.job.spec.nodes)
        }
        self.gangs.append(Gang(AttemptView(name, uid, attempt), pods, step=self.committed))

    def _delete_pylon_job(self) -> None:
        self.saw_record_before_ttl = self.job.status.completion_time is not None
        self.deleted = True
        self.gangs.clear()

    def _train(self, gang: Gang) -> None:
        pods = gang.pods
        if gang.dying or any(pod.terminal for pod in pods.values()) or len(pods) < self.job.spec.nodes:
            return
        if any(pod.phase == "Pending" for pod in pods.values()):
            for index, pod in pods.items():
                ip = f"10.0.0.{index}"
                pods[index] = replace(pod, phase="Running", ready=True, node=f"node-{index}", ip=ip)
            return
        before, gang.step = gang.step, gang.step + STEPS_PER_TICK
        death = self.deaths.get(gang.view.attempt)
        if death and death.step <= gang.step:
            gang.step = max(before, death.step)
            report = a_report(death.exit_code, ExitCode(death.exit_code).reason, death.message)
            self._end(gang, death.pod, death.exit_code, report)
            return
        boundary = gang.step // self.interval_steps * self.interval_steps
        self.committed = max(self.committed, boundary if boundary > before else 0)
        if self.requested and self.commits_on_request:
            self.committed, self.requested = max(self.committed, gang.step), False
        if gang.step >= self.job.spec.training.schedule.steps:
            self.committed = gang.step
            for index in pods:
                self._end(gang, index, 0)

    def _end_dying(self, gang: Gang) -> None:
        for index in list(gang.dying):
            gang.dying[index] -= 1
            pod = gang.pods.get(index)
            if pod is None:
                del gang.dying[index]
            elif gang.dying[index] <= 0 and pod.node not in self.dead_nodes:
                del gang.dying[index]
                if not pod.terminal:
                    self._end(gang, index, ExitCode.PEER_LOST)
                if not gang.view.name:
                    del gang.pods[index]

    def _control(self, gang: Gang) -> None:
        """The Job controller: complete when all have, failed when one has, and then the others end."""
        view, pods = gang.view, gang.pods.values()
        if not view.name or view.complete:
            return
        if len(pods) == self.job.spec.nodes and all(pod.phase == "Succeeded" for pod in pods):
            gang.view = replace(view, complete=True)
        elif any(pod.phase == "Failed" for pod in pods) or len(pods) < self.job.spec.nodes:
            gang.view = replace(view, failed=True, reason="BackoffLimitExceeded")
            self._terminate(gang)

    def _terminate(self, gang: Gang) -> None:
        for index, pod in gang.pods.items():
            if index not in gang.dying:
                gang.dying[index] = TICKS_TO_DIE
                if not pod.terminal:
                    gang.pods[index] = replace(pod, deletion_time=self.now + timedelta(seconds=30))

    def _end(self, gang: Gang, index: int, code: int, message: str = "") -> None:
        if code == ExitCode.PEER_LOST:
            message = a_report(code, "PeerLost", final=self._final(gang) if index == 0 else None)
        ended = {"phase": "Failed" if code else "Succeeded", "exit_code": code, "finished_time": self.now}
        if not code and index == 0:
            message = a_report(0, "Succeeded", final=self._final(gang))
        gang.pods[index] = replace(gang.pods[index], **ended, ready=False, message=message)

    def _final(self, gang: Gang) -> TrainerStatus:
        return TrainerStatus(
            uid=UID,
            attempt=gang.view.attempt,
            phase=TrainerPhase.TRAINING,
            step=gang.step,
            checkpoint=a_checkpoint(self.committed) if self.committed else None,
        )

    def _status_of(self, gang: Gang) -> TrainerStatus | None:
        """Rank 0 answers while its pod runs on a node that lives."""
        pod = gang.pods.get(0)
        alive = pod and pod.phase == "Running" and pod.node not in self.dead_nodes
        return self._final(gang) if alive else None

    def _remove_pod(self, uid: str) -> None:
        for gang in self.gangs:
            gang.pods = {index: pod for index, pod in gang.pods.items() if pod.uid != uid}

    def _update_pod(self, uid: str, **fields: Any) -> None:
        for gang in self.gangs:
            gang.pods = {i: replace(p, **fields) if p.uid == uid else p for i, p in gang.pods.items()}


Happening = tuple[Callable[[SimulatedCluster], bool], Callable[[SimulatedCluster], None]]
"""When it holds for the first time, that happens."""


async def live(
    cluster: SimulatedCluster, *happenings: Happening, ticks: int = 200, downtime_ticks: int = 0
) -> SimulatedCluster:
    """Reconcile and tick until the job has ended and nothing of it moves, or is deleted.

    An operator that is killed starts again `downtime_ticks` later.
    """
    pending = list(happenings)
    name, down = cluster.job.metadata.name, 0
    due, last_seen = cluster.now, None
    for _ in range(ticks):
        for happening in [happening for happening in pending if happening[0](cluster)]:
            pending.remove(happening)
            happening[1](cluster)
        # As watch events and polls do: only a change, or the time asked for, leads to another look.
        seen = await cluster.observe("team", name)
        while not down and (cluster.now >= due or seen != last_seen):
            last_seen = seen
            try:
                wait = await reconcile(cluster, "team", name, cluster.now)
            except OperatorKilled:
                down, due = downtime_ticks, cluster.now
                continue
            if wait is None and not pending:
                return cluster
            due = cluster.now + timedelta(seconds=wait) if wait is not None else datetime.max.replace(tzinfo=UTC)
            break
        down = max(0, down - 1)
        cluster.tick()
    raise AssertionError(f"still {cluster.job.status.phase} after {ticks} ticks")
