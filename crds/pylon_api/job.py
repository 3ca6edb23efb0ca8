"""The `PylonJob` itself: what a person applies, and the status that the operator writes back."""

from __future__ import annotations

import enum
from datetime import datetime
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from pylon_api import names
from pylon_api.base import Report, Spec, rule, rules
from pylon_api.run import CheckpointReport, GateReport, SaveReport
from pylon_api.training import TrainingSpec

PodTemplate = Annotated[
    dict[str, Any],
    Field(json_schema_extra={"type": "object", "x-kubernetes-preserve-unknown-fields": True}),
]
QualifiedName = Annotated[
    str,
    StringConstraints(
        pattern=r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$",
        max_length=317,
    ),
]


IMMUTABLE_FIELDS = (
    "nodes",
    "gpusPerNode",
    "processesPerNode",
    "gpuResourceName",
    "managedBy",
    "scheduling",
    "topology",
    "training",
)
"""Fields of the spec that no update may change, because what was trained before would no longer fit."""


class FailureAction(enum.StrEnum):
    RESTART = "Restart"
    RESTART_FREELY = "RestartFreely"
    FAIL = "Fail"


class FailureRule(Spec):
    """One rule of the failure policy. It applies when every selector that it sets matches."""

    action: FailureAction
    """Restart: the whole gang starts again and the restart counts. RestartFreely: it starts again and does not count.
    Fail: the job ends at once."""
    exit_codes: list[Annotated[int, Field(ge=1, le=255)]] = Field(default=[], max_length=64)
    """Exit codes of the trainer's container. Empty: any."""
    pod_reasons: list[Annotated[str, StringConstraints(min_length=1, max_length=64)]] = Field(default=[], max_length=32)
    """Reasons of the pod or its container, for example Evicted, OOMKilled, NodeLost, Preempted. Empty: any."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "(has(self.exitCodes) && self.exitCodes.size() > 0) || "
                "(has(self.podReasons) && self.podReasons.size() > 0)",
                "a rule needs exitCodes or podReasons",
            )
        )
    )

    @model_validator(mode="after")
    def _selects_something(self) -> Self:
        if not self.exit_codes and not self.pod_reasons:
            raise ValueError("a rule needs exitCodes or podReasons")
        return self


class FailurePolicy(Spec):
    """What happens when a pod fails: the whole gang restarts from the newest committed checkpoint, or the job ends."""

    max_restarts: int = Field(default=5, ge=0, le=10000)
    """Restarts allowed without a newly committed checkpoint in between; 0 ends the job at the first failure. A job that
    makes progress may be preempted for ever."""
    backoff_seconds: int = Field(default=10, ge=0, le=3600)
    """Wait before the second counted restart without progress, in seconds; doubled for each further one, up to an hour.
    The first is at once, one that does not count always waits this long."""
    rules: list[FailureRule] = Field(default=[], max_length=32)
    """Tried in order, the first match decides. Where none matches: exit codes 65 (bad data) and 78 (bad configuration)
    fail the job, everything else restarts it."""


class SchedulingSpec(Spec):
    """How the gang is placed."""

    queue_name: Annotated[str, StringConstraints(min_length=1, max_length=253)] | None = None
    """Queue of the gang scheduler in use. Unset: the cluster's default scheduler, pod by pod."""
    priority_class_name: Annotated[str, StringConstraints(min_length=1, max_length=253)] | None = None
    """Priority class of the pods. Unset: the cluster's default."""


class TopologySpec(Spec):
    """Which node labels say how far apart two pods are."""

    levels: list[QualifiedName] = Field(default=[], max_length=8)
    """Node label keys, outermost first, for example topology.kubernetes.io/zone, then a rack label. Empty: only nodes
    are told apart."""


class PylonJobSpec(Spec):
    """What should run."""

    nodes: int = Field(default=1, ge=1, le=4096)
    """Pods of the gang, each on a node of its own when gpusPerNode fills one. Immutable."""
    gpus_per_node: int = Field(default=0, ge=0, le=64)
    """GPUs each pod asks for; 0 trains on CPU. Immutable."""
    processes_per_node: int | None = Field(default=None, ge=1, le=256)
    """Training processes in each pod. Unset: gpusPerNode, or 1 on CPU. Immutable."""
    gpu_resource_name: QualifiedName = "nvidia.com/gpu"
    """Extended resource that stands for one GPU. Immutable."""
    image: Annotated[str, StringConstraints(min_length=1, max_length=1024)] | None = None
    """Image of the trainer's container. Unset: the operator's default."""
    template: PodTemplate = {}
    """Partial pod template (metadata, spec), merged over the generated one as the API server would merge a strategic
    patch: containers and env by name, other lists by their keys. The trainer's container is named `trainer`."""
    suspend: bool = False
    """true saves a checkpoint, deletes the pods and waits; false resumes from that checkpoint."""
    managed_by: QualifiedName = names.MANAGED_BY
    """Controller that acts on this job; any other value makes this operator leave it alone. Immutable."""
    active_deadline_seconds: int | None = Field(default=None, ge=1, le=2**31)
    """Seconds of running time, over all attempts, after which the job fails; time suspended does not count.
    Unset: no limit."""
    ttl_seconds_after_finished: int | None = Field(default=None, ge=0, le=2**31)
    """Seconds after the end when the PylonJob is deleted with all its objects. Unset: it stays."""
    checkpoint_timeout_seconds: int = Field(default=120, ge=0, le=86400)
    """Seconds to wait for a commit that was asked for before pods are deleted (suspend); 0 does not ask. Also the pods'
    termination grace, which is at least 30, unless template sets terminationGracePeriodSeconds."""
    failure_policy: FailurePolicy = FailurePolicy()
    """What happens when a pod fails."""
    scheduling: SchedulingSpec = SchedulingSpec()
    """How the gang is placed. Immutable."""
    topology: TopologySpec = TopologySpec()
    """Which node labels say how far apart two pods are. Immutable."""
    training: TrainingSpec
    """The recipe, passed to the trainer untouched. Immutable."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            *(
                # On the parent, with has(): a rule on an optional field itself is skipped when the field comes or goes.
                rule(
                    f"has(self.{field}) == has(oldSelf.{field}) && "
                    f"(!has(self.{field}) || self.{field} == oldSelf.{field})",
                    f"{field} is immutable: delete the job and make another",
                    fieldPath=f".{field}",
                )
                for field in IMMUTABLE_FIELDS
            ),
            rule(
                "!has(self.training.batch) || !has(self.training.batch.sequences) || "
                "self.training.batch.sequences % (self.nodes * (has(self.processesPerNode) ? self.processesPerNode : "
                "(self.gpusPerNode > 0 ? self.gpusPerNode : 1))) == 0",
                "training.batch.sequences must be divisible by the number of processes (nodes x processesPerNode)",
                fieldPath=".training.batch.sequences",
            ),
        )
    )

    @property
    def processes(self) -> int:
        """Training processes in each pod."""
        return self.processes_per_node or self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        """Training processes of the whole gang."""
        return self.nodes * self.processes

    @model_validator(mode="after")
    def _batch_splits_evenly(self) -> Self:
        sequences = self.training.batch.sequences
        if sequences % self.world_size:
            raise ValueError(
                f"training.batch.sequences {sequences} must be divisible by the number of processes "
                f"({self.nodes} nodes x {self.processes} = {self.world_size})"
            )
        return self


class ConditionStatus(enum.StrEnum):
    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class Condition(Report):
    """A metav1.Condition."""

    type: Annotated[str, StringConstraints(max_length=316)]
    """CamelCase name of the condition."""
    status: ConditionStatus
    """True, False or Unknown."""
    reason: Annotated[str, StringConstraints(min_length=1, max_length=1024)]
    """CamelCase cause of the last transition."""
    message: Annotated[str, StringConstraints(max_length=32768)] = ""
    """What a person should know."""
    last_transition_time: datetime
    """When status last changed."""
    observed_generation: int = Field(default=0, ge=0)
    """metadata.generation that this was computed from."""


class TrainingProgress(Report):
    """How far training is, as rank 0 last said. Its fields are those of TrainerStatus; losses and rates are rounded."""

    step: int = Field(default=0, ge=0)
    """Optimizer steps done."""
    total_steps: int = Field(default=0, ge=0)
    """Optimizer steps to do."""
    tokens: int = Field(default=0, ge=0)
    """Tokens trained on."""
    loss: float | None = None
    """Training loss, nats per token."""
    held_out_loss: float | None = None
    """Held-out loss, nats per token."""
    tokens_per_second: float | None = None
    """Tokens per second over all ranks."""
    gate: GateReport | None = None
    """What the gate is doing; unset without gating."""
    bytes_per_step: int | None = None
    """Bytes that one rank exchanged per step, the larger of sent and received."""
    skipped_steps: int = 0
    """Steps of this attempt whose update was left out because logits or gradients were not finite."""
    saves: SaveReport | None = None
    """How saving goes; unset when nothing is saved."""
    notices: list[str] = Field(default=[], max_length=20)
    """What a person should know, for example a damaged checkpoint that was passed over; newest last."""
    sample: str | None = None
    """Generated text, at the end; its beginning if it is long."""
    export_uri: str | None = None
    """Where the export went."""


class FailureRecord(Report):
    """How one attempt ended."""

    attempt: int
    """Number of the attempt."""
    reason: str
    """CamelCase cause."""
    message: str = ""
    """The trainer's or Kubernetes' own words."""
    exit_code: int | None = None
    """Exit code of the pod that explains the attempt."""
    pod: str | None = None
    """That pod's name."""
    node: str | None = None
    """That pod's node."""
    step: int | None = None
    """Step at which it died."""
    time: datetime
    """When."""


class PylonJobStatus(Report):
    """What is happening. Written by the operator once per reconcile."""

    observed_generation: int = Field(default=0, ge=0)
    """metadata.generation of the spec that this status answers."""
    phase: str = ""
    """One word for people; programs read conditions."""
    conditions: list[Condition] = Field(
        default=[],
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    """Suspended, PodsReady, Running, CheckpointReady, Succeeded. Succeeded sums up: Unknown while in progress."""
    attempt: int = Field(default=0, ge=0)
    """Number of the current attempt, from 1; written before anything of it is created, so that it fences the others."""
    attempt_job_uid: str | None = None
    """uid of the batch Job of this attempt, once it has been seen."""
    attempt_start_time: datetime | None = None
    """When all pods of this attempt first ran."""
    next_attempt_time: datetime | None = None
    """When the back-off ends."""
    active_seconds: int = Field(default=0, ge=0)
    """Running time of all earlier attempts."""
    restarts: int = Field(default=0, ge=0)
    """Restarts after a failure."""
    restarts_without_progress: int = Field(default=0, ge=0)
    """Restarts since the last newly committed checkpoint; failurePolicy.maxRestarts bounds it."""
    restart_checkpoint_step: int = Field(default=0, ge=0)
    """Committed step at the last restart; a higher one is progress, and so is any of a later attempt."""
    restart_checkpoint_attempt: int = Field(default=0, ge=0)
    """Attempt that had committed it."""
    ready: str = ""
    """Ready pods of all pods, as n/m."""
    pods_ready: int = Field(default=0, ge=0)
    """Ready pods."""
    gate: str = ""
    """Share of tokens that carries gradient, or `plain` while all do, for people; training.gate says more. Empty
    without gating."""
    start_time: datetime | None = None
    """When the operator first took the job up."""
    completion_time: datetime | None = None
    """When the job ended, either way."""
    suspend_requested_time: datetime | None = None
    """When the checkpoint before a suspend was asked for."""
    suspend_step: int | None = None
    """Step at which it was asked for; the commit to wait for is of the current attempt and has at least this step."""
    training: TrainingProgress | None = None
    """How far training is."""
    checkpoint: CheckpointReport | None = None
    """The newest committed checkpoint: that of the latest attempt that committed any, and of its highest step."""
    failures: list[FailureRecord] = Field(default=[], max_length=10)
    """How the last attempts ended, newest last."""


class ObjectMeta(Report):
    """The part of a Kubernetes object's metadata that Pylon reads."""

    name: str
    namespace: str = "default"
    uid: str = ""
    generation: int = 0
    resource_version: str = ""
    creation_timestamp: datetime | None = None
    deletion_timestamp: datetime | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class PylonJob(Report):
    """A training job: a gang of pods that trains one model."""

    api_version: str = names.API_VERSION
    kind: str = names.KIND
    metadata: ObjectMeta
    spec: PylonJobSpec
    status: PylonJobStatus = PylonJobStatus()
