"""What operator and trainer say to each other: the run's configuration one way, reports the other way."""

from __future__ import annotations

import enum
from datetime import datetime

from pydantic import Field

from pylon_api.base import Report, Spec
from pylon_api.training import TrainingSpec


class RunConfig(Spec):
    """The file behind PYLON_CONFIG: one attempt of one job."""

    job: str
    """Name of the PylonJob."""
    namespace: str
    """Its namespace."""
    uid: str
    """Its uid; part of the checkpoint directory, so that a new job of an old name starts anew."""
    attempt: int = Field(ge=1)
    """Number of the attempt; an older one can never overwrite what a newer one saved."""
    nodes: int = Field(ge=1)
    """Pods of the gang."""
    processes_per_node: int = Field(ge=1)
    """Processes in each pod."""
    gpus_per_node: int = Field(ge=0)
    """GPUs of each pod; 0 trains on CPU."""
    topology_levels: list[str] = []
    """Node labels of the topology map, outermost first."""
    training: TrainingSpec
    """spec.training, untouched."""

    @property
    def world_size(self) -> int:
        """Training processes of the whole gang."""
        return self.nodes * self.processes_per_node

    @property
    def checkpoint_directory(self) -> str | None:
        """URI of the directory that holds this job's checkpoints and nobody else's, or None without checkpoints."""
        if self.training.checkpoint is None:
            return None
        root = self.training.checkpoint.uri.rstrip("/")
        return f"{root}/{self.namespace}/{self.job}-{self.uid[:8]}"


class CheckpointReport(Report):
    """One committed checkpoint."""

    step: int = Field(ge=0)
    """Optimizer step that it holds."""
    uri: str
    """Its directory."""
    committed_time: datetime | None = None
    """When its commit marker was written."""
    size_bytes: int | None = None
    """Bytes of all its files."""


class TrainerPhase(enum.StrEnum):
    STARTING = "Starting"
    RESTORING = "Restoring"
    TRAINING = "Training"
    SAVING = "Saving"
    EXPORTING = "Exporting"
    FINISHED = "Finished"


class TrainerStatus(Report):
    """Rank 0's answer to `GET /status`."""

    uid: str
    """uid of the PylonJob, so that a reused address is never mistaken for this job."""
    attempt: int
    """Number of the attempt that speaks."""
    phase: TrainerPhase = TrainerPhase.STARTING
    """What the trainer is doing."""
    step: int = 0
    """Optimizer steps done."""
    total_steps: int = 0
    """Optimizer steps to do."""
    tokens: int = 0
    """Tokens trained on."""
    loss: float | None = None
    """Training loss over the last log interval, nats per token, over every token whether gated or not."""
    held_out_loss: float | None = None
    """Held-out loss, nats per token."""
    tokens_per_second: float | None = None
    """Tokens per second over all ranks, last log interval."""
    token_ratio: float | None = None
    """Share of tokens that carried gradient in the last log interval; unset without gating."""
    bytes_per_step: int | None = None
    """Bytes that one rank exchanged per step, the larger of sent and received."""
    skipped_steps: int = 0
    """Steps of this attempt whose update was left out because gradients were not finite."""
    step_seconds: float | None = None
    """Median seconds per step over the last log interval."""
    checkpoint: CheckpointReport | None = None
    """The newest committed checkpoint."""
    checkpoint_requested_step: int | None = None
    """Step that the last request (POST /checkpoint) will save at; unset when none is pending."""
    restored_from: str | None = None
    """Checkpoint that this attempt began from."""
    notices: list[str] = Field(default=[], max_length=20)
    """What a person should know, for example a damaged checkpoint that was passed over; newest last."""
    sample: str | None = None
    """Generated text, at the end."""
    export_uri: str | None = None
    """Where the export went."""


class TerminationReport(Report):
    """The pod's termination message (JSON, below Kubernetes' 4096 bytes): why it ended."""

    exit_code: int
    """Exit code of the pod; pylon_api.names.ExitCode names those of ours."""
    reason: str
    """CamelCase name of the exit."""
    message: str = Field(default="", max_length=2048)
    """One line: the field, the value, the fix."""
    rank: int | None = None
    """Global rank that failed first."""
    final: TrainerStatus | None = None
    """Last status, from the pod of rank 0 only."""
