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
    failures: int = Field(default=0, ge=0)
    """Attempts of this job that a failure ended."""
    run_seconds: int = Field(default=0, ge=0)
    """Seconds that this job's earlier attempts ran."""
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
        return self._below(self.training.checkpoint.uri)

    @property
    def local_checkpoint_directory(self) -> str | None:
        """The same on the disk of each node, or None when nothing is kept there."""
        checkpoint = self.training.checkpoint
        return None if checkpoint is None or checkpoint.local is None else self._below(checkpoint.local.directory)

    def _below(self, root: str) -> str:
        return f"{root.rstrip('/')}/{self.namespace}/{self.job}-{self.uid[:8]}"


class CheckpointReport(Report):
    """One committed checkpoint."""

    step: int = Field(ge=0)
    """Optimizer step that it holds."""
    attempt: int = Field(default=0, ge=0)
    """Attempt that saved it; a later attempt's is newer whatever its step."""
    uri: str
    """Its directory."""
    committed_time: datetime | None = None
    """When its commit marker was written."""
    size_bytes: int | None = None
    """Bytes of all its files."""

    @property
    def recency(self) -> tuple[int, int]:
        """Attempt and step; greater for a newer one of the same job. Steps alone do not tell: an attempt that had to go
        back to an older checkpoint commits steps anew."""
        return self.attempt, self.step


class SaveReport(Report):
    """How saving goes, in this attempt."""

    committed: int = Field(default=0, ge=0)
    """Checkpoints committed."""
    failed: int = Field(default=0, ge=0)
    """Checkpoints given up because a store or disk refused them."""
    failed_in_row: int = Field(default=0, ge=0)
    """Checkpoints given up since the last commit."""
    put_off: int = Field(default=0, ge=0)
    """Checkpoints that fell due while those before them were still being written, and so had to wait."""
    failure: str = ""
    """Why the last one was given up; empty once another is committed."""
    stall_seconds: float | None = None
    """Seconds that the last checkpoint kept training from going on."""
    write_seconds: float | None = None
    """Seconds from the beginning of the last committed one to its commit."""
    interval_steps: int | None = None
    """Steps between checkpoints by the interval now in force; unset when none is."""


class TrainerPhase(enum.StrEnum):
    STARTING = "Starting"
    RESTORING = "Restoring"
    TRAINING = "Training"
    SAVING = "Saving"
    EXPORTING = "Exporting"
    FINISHED = "Finished"


class GateDecision(enum.StrEnum):
    GATED = "Gated"
    PLAIN = "Plain"


class GateReport(Report):
    """What confidence-gated gradient routing is doing, over all ranks. The trainer renews it once per log interval."""

    decision: GateDecision
    """Gated: a share of the tokens carries gradient. Plain: all do, because leaving some out would not pay now."""
    reason: str = ""
    """Why, in words: the figures that decided."""
    ratio: float = Field(ge=0, le=1)
    """Share of tokens that carries gradient now; 1 in a plain step."""
    retained_mass: float | None = None
    """Share of all tokens' gradient norm that the `ratio` hardest of them hold; unset until measured."""
    effective_token_share: float | None = None
    """How many plain tokens one token of a gated batch is worth: sum g^2 / sum (g^2 / p) by the gradient's variance,
    with g a token's gradient norm and p the probability that it is chosen, less what the engine cuts between tokens; 1
    in a plain step. Unset until measured."""
    saved_flops_ratio: float = 0
    """Share of a plain step's floating-point operations that a step now spares, by the engine's cost model; 0 in a
    plain step."""
    nonfinite_steps: int = 0
    """Steps of this attempt with logits that were infinite or not a number; no update came from them."""

    @property
    def summary(self) -> str:
        """The ratio, or `plain`: what fits a column."""
        return "plain" if self.decision is GateDecision.PLAIN else f"{self.ratio:.2f}"


class Histogram(Report):
    """How many tokens fell into each bin since the attempt began."""

    bounds: list[float] = Field(max_length=32)
    """Upper bounds of the bins, rising, each part of its bin; the first bin is all that is at most the first bound."""
    counts: list[int] = Field(max_length=33)
    """Tokens in each bin, and last those above every bound."""
    sum: float
    """Sum of all values."""


class DifficultyReport(Report):
    """How hard the tokens that were scored were for the model: all tokens of gated steps, and of some plain ones."""

    gradient_norm: Histogram
    """|softmax - onehot| of a token's logits, 0 to the square root of 2."""
    entropy: Histogram
    """Entropy of a token's prediction, nats."""


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
    gate: GateReport | None = None
    """What the gate is doing; unset without gating."""
    difficulty: DifficultyReport | None = None
    """How hard the tokens were; unset without gating."""
    bytes_per_step: int | None = None
    """Bytes that rank 0 exchanged with others per step, all in, the larger of sent and received; median of the last log
    interval."""
    bytes_per_step_peak: int | None = None
    """The most of any step of this attempt."""
    healed_replicas: int = 0
    """Times in this attempt that ranks whose weights or optimizer state differed were given rank 0's."""
    skipped_steps: int = 0
    """Steps of this attempt whose update was left out because logits or gradients were not finite."""
    step_seconds: float | None = None
    """Mean seconds per step over the last log interval."""
    checkpoint: CheckpointReport | None = None
    """The newest committed checkpoint."""
    saves: SaveReport | None = None
    """How saving goes; unset when nothing is saved."""
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
