"""What a reconcile sees and what it may do: the only words that the pure plan and the I/O around it share.

Views keep the few fields that decisions need, because a cluster holds thousands of pods and a full Pod takes kilobytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from pylon_api.job import PylonJob, PylonJobStatus
from pylon_api.run import TrainerStatus

DISRUPTED = frozenset({"Preempted", "Evicted", "NodeLost"})
"""Reasons of a pod that ends through no doing of its own."""


@dataclass(frozen=True, slots=True)
class PodView:
    """One pod of the job, of any attempt."""

    name: str
    uid: str
    attempt: int
    index: int
    job_uid: str = ""
    """uid of the batch Job that owns it."""
    phase: str = "Pending"
    ready: bool = False
    node: str | None = None
    ip: str | None = None
    exit_code: int | None = None
    """Exit code of the trainer's container, once it has ended."""
    reason: str | None = None
    """Pod's or container's reason: Evicted, OOMKilled, NodeLost, Error, ..."""
    message: str = ""
    """Termination message of the trainer's container, else the pod's message."""
    finished_time: datetime | None = None
    deletion_time: datetime | None = None
    """metadata.deletionTimestamp: when the grace period ends."""
    topology: str | None = None
    """Annotation names.ANNOTATION_TOPOLOGY, once set."""

    @property
    def terminal(self) -> bool:
        """Whether none of its containers can run again."""
        return self.phase in ("Succeeded", "Failed")

    @property
    def failed(self) -> bool:
        """Whether its trainer has failed, even if a sidecar keeps the pod running."""
        return self.phase == "Failed" or self.exit_code not in (None, 0)

    @property
    def disrupted(self) -> bool:
        """Whether the cluster is taking it away: evicted, preempted, or its node drained or lost."""
        return self.deletion_time is not None and not self.terminal and self.reason in DISRUPTED


@dataclass(frozen=True, slots=True)
class AttemptView:
    """One batch Job of the job."""

    name: str
    uid: str
    attempt: int
    complete: bool = False
    failed: bool = False
    """It has a Failed or FailureTarget condition."""
    reason: str = ""
    """Reason of that condition."""
    deleting: bool = False
    edited: bool = False
    """A field that we own no longer holds what we wrote."""
    creation_time: datetime | None = None


@dataclass(frozen=True, slots=True)
class Observed:
    """Everything that one decision may rest on."""

    job: PylonJob
    attempts: tuple[AttemptView, ...] = ()
    pods: tuple[PodView, ...] = ()
    trainer: TrainerStatus | None = None
    """Rank 0's newest answer, when it is of the current attempt."""
    namespace_terminating: bool = False
    missing_children: frozenset[str] = frozenset()
    """Kinds among Service and ConfigMap that the current attempt should have and has not."""


@dataclass(frozen=True, slots=True)
class CreateAttempt:
    """Apply the Service, ConfigMap, token Secret and Job of the attempt; what exists and is ours is adopted."""

    attempt: int


@dataclass(frozen=True, slots=True)
class DeleteAttempt:
    """Delete a batch Job with its pods, only if it still has this uid; also the Service and ConfigMap of its name."""

    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class ForceDeletePod:
    """Delete a pod of an unreachable node without waiting for its kubelet."""

    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class AnnotateTopology:
    """Tell a pod the topology domains of its node."""

    pod: str
    uid: str
    node: str


@dataclass(frozen=True, slots=True)
class RequestCheckpoint:
    """POST /checkpoint to rank 0."""

    ip: str


@dataclass(frozen=True, slots=True)
class DeleteJob:
    """Delete the PylonJob itself (TTL)."""

    uid: str


@dataclass(frozen=True, slots=True)
class EmitEvent:
    """A Kubernetes Event on the PylonJob."""

    type: str
    """Normal or Warning."""
    reason: str
    message: str


Action = CreateAttempt | DeleteAttempt | ForceDeletePod | AnnotateTopology | RequestCheckpoint | DeleteJob | EmitEvent


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, in this order: the actions, then one write of the status if it differs, then the events.

    The one exception is a new attempt: `status.attempt` rises in a decision that creates nothing of that attempt; the
    reconcile that sees the new number persisted creates it.
    """

    status: PylonJobStatus
    actions: tuple[Action, ...] = ()
    requeue_after_seconds: float | None = None
    """When to look again even if nothing changes; None waits for the next event."""
