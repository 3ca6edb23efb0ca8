"""`spec.training`: what is trained, on what, and how. The operator passes it on untouched; the trainer obeys it.

Every description gives meaning, unit, default and how to switch the thing off, because `kubectl explain` prints it.
Limits that need a look at the data (vocabulary, files, devices) are the trainer's to check.
"""

from __future__ import annotations

import enum
from typing import Annotated, Self

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from pylon_api.base import Spec, rule, rules

Uri = Annotated[str, StringConstraints(min_length=1, max_length=2048)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=2**53)]


class Architecture(enum.StrEnum):
    TRANSFORMER = "Transformer"


class ModelSpec(Spec):
    """The network. Defaults are the quickstart's: a byte-level Transformer that trains on two CPU cores."""

    architecture: Architecture = Architecture.TRANSFORMER
    """Transformer: pre-norm decoder with RoPE, SwiGLU, grouped-query attention and RMSNorm."""
    layers: int = Field(default=4, ge=1, le=1024)
    """Number of blocks."""
    hidden_size: int = Field(default=128, ge=8, le=65536)
    """Width of the residual stream."""
    heads: int = Field(default=4, ge=1, le=1024)
    """Query heads. hiddenSize must be divisible by it, with an even quotient (RoPE turns pairs)."""
    kv_heads: int | None = Field(default=None, ge=1, le=1024)
    """Key and value heads; heads must be divisible by it. Unset: as many as heads (no grouping)."""
    intermediate_size: int | None = Field(default=None, ge=8, le=262144)
    """Inner width of the SwiGLU MLP. Unset: 8/3 of hiddenSize, rounded up to a multiple of 64."""
    vocab_size: int | None = Field(default=None, ge=2, le=4194304)
    """Rows of the embedding. Unset: what the tokenizer needs. Set: at least that, or the trainer refuses."""
    embedding_rank: int = Field(default=0, ge=0, le=65536)
    """Rank of factorised embeddings (vocabulary x rank, then rank x hiddenSize); 0 switches factorisation off."""
    tie_embeddings: bool = True
    """Whether the output head shares the embedding's weights."""
    rope_theta: float = Field(default=10000.0, gt=0)
    """Base of the rotary position frequencies."""
    norm_epsilon: float = Field(default=1e-5, gt=0, lt=1)
    """Epsilon inside RMSNorm."""
    initializer_std: float = Field(default=0.02, gt=0, le=1)
    """Standard deviation of the normal initialisation of matrices."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("self.hiddenSize % (self.heads * 2) == 0", "hiddenSize must be divisible by 2 x heads"),
            rule("!has(self.kvHeads) || self.heads % self.kvHeads == 0", "heads must be divisible by kvHeads"),
        )
    )

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hiddenSize {self.hidden_size} must be divisible by 2 x heads ({2 * self.heads})")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} must be divisible by kvHeads {self.kv_heads}")
        return self


class DataFormat(enum.StrEnum):
    AUTO = "Auto"
    TEXT = "Text"
    JSONL = "Jsonl"
    PARQUET = "Parquet"


class Packing(enum.StrEnum):
    CONCATENATED = "Concatenated"
    ISOLATED = "Isolated"


class TokenizerKind(enum.StrEnum):
    BYTES = "Bytes"
    FILE = "File"


class TokenizerSpec(Spec):
    """How text becomes token ids."""

    kind: TokenizerKind = TokenizerKind.BYTES
    """Bytes: the 256 byte values and an end-of-document token. File: a `tokenizers` JSON file at `uri`."""
    uri: Uri | None = None
    """Any fsspec URI of a tokenizer.json; needed with kind File, refused with kind Bytes."""
    end_of_text: str | None = Field(default=None, max_length=256)
    """Token that ends a document. Unset: found among the file's special tokens."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("(self.kind == 'File') == has(self.uri)", "uri goes with kind File, and only with it"),
        )
    )

    @model_validator(mode="after")
    def _uri_fits_kind(self) -> Self:
        if (self.kind is TokenizerKind.FILE) != (self.uri is not None):
            raise ValueError("uri goes with kind File, and only with it")
        return self


class DataSpec(Spec):
    """Where the text is and how it becomes sequences."""

    train: list[Uri] = Field(min_length=1, max_length=256)
    """fsspec globs, for example `s3://bucket/books/**/*.jsonl`. `python://stdlib/**/*.py` names the standard library's
    own sources, which every machine with Python has."""
    held_out: list[Uri] = Field(default=[], max_length=256)
    """Globs of held-out documents. Empty: heldOutFraction of the training documents are held out instead."""
    held_out_fraction: Fraction = 0.02
    """Share of documents held out, chosen by a hash of their place, so that it never changes; 0 switches it off."""
    format: DataFormat = DataFormat.AUTO
    """Auto goes by the file's ending: .jsonl, .parquet, everything else is text (one document a file)."""
    text_field: str = Field(default="text", min_length=1, max_length=256)
    """Field or column that holds the text in JSONL and Parquet."""
    tokenizer: TokenizerSpec = TokenizerSpec()
    """How text becomes token ids."""
    sequence_length: int = Field(default=256, ge=8, le=1048576)
    """Tokens per training sequence."""
    packing: Packing = Packing.CONCATENATED
    """Concatenated: documents follow each other and may attend across. Isolated: attention and positions stop at
    document borders."""
    shuffle: bool = True
    """Whether the order of documents is drawn anew each epoch (from training.seed)."""
    prefetch_batches: int = Field(default=2, ge=0, le=64)
    """Batches prepared ahead in the background; 0 prepares each batch when it is asked for."""


class OptimizerName(enum.StrEnum):
    ADAMW = "AdamW"


class OptimizerSpec(Spec):
    """How gradients become updates."""

    name: OptimizerName = OptimizerName.ADAMW
    """AdamW with decoupled weight decay; norms and embeddings' vectors of one dimension are not decayed."""
    learning_rate: float = Field(default=3e-4, gt=0, le=10)
    """Peak learning rate."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    epsilon: float = Field(default=1e-8, gt=0, lt=1)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0, le=10)
    """Decoupled weight decay per unit of learning rate; 0 switches it off."""
    gradient_clip_norm: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 switches clipping off."""


class ScheduleKind(enum.StrEnum):
    COSINE = "Cosine"
    WARMUP_STABLE_DECAY = "WarmupStableDecay"
    CONSTANT = "Constant"


class ScheduleSpec(Spec):
    """How long training runs and how the learning rate moves. Exactly one of steps and tokens says how long."""

    kind: ScheduleKind = ScheduleKind.COSINE
    """Cosine: warm-up, then half a cosine. WarmupStableDecay: warm-up, constant, linear decay over decayFraction at the
    end. Constant: warm-up, then constant."""
    steps: Count | None = None
    """Optimizer steps to train for."""
    tokens: Count | None = None
    """Tokens to train for; rounded up to whole steps."""
    warmup_steps: int = Field(default=100, ge=0, le=2**53)
    """Steps of linear warm-up; 0 switches it off."""
    decay_fraction: Fraction = 0.2
    """Share of all steps spent decaying (WarmupStableDecay only)."""
    minimum_learning_rate_ratio: Fraction = 0.1
    """Learning rate at the end, as a share of the peak."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("has(self.steps) != has(self.tokens)", "set exactly one of steps and tokens"),
        )
    )

    @model_validator(mode="after")
    def _one_duration(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("set exactly one of steps and tokens")
        return self


class BatchSpec(Spec):
    """How much data goes into a step."""

    sequences: int = Field(default=32, ge=1, le=1048576)
    """Sequences per optimizer step, over all processes."""
    micro_sequences: int | None = Field(default=None, ge=1, le=1048576)
    """Sequences per forward pass of one process; the rest is accumulated. Unset: all of a process's share at once."""


class Precision(enum.StrEnum):
    BFLOAT16 = "BFloat16"
    FLOAT32 = "Float32"


class Compile(enum.StrEnum):
    OFF = "Disabled"  # YAML 1.1 reads a bare Off as false
    DEFAULT = "Default"


class GatingStrategy(enum.StrEnum):
    OFF = "Disabled"  # YAML 1.1 reads a bare Off as false
    GRADIENT_NORM = "GradientNorm"
    ENTROPY = "Entropy"
    LOSS = "Loss"
    MARGIN = "Margin"
    RANDOM = "Random"


class GatingSelection(enum.StrEnum):
    SAMPLED = "Sampled"
    TOP = "Top"


class GatingEngine(enum.StrEnum):
    HEAD_ONLY = "HeadOnly"
    SINGLE_PASS = "SinglePass"  # noqa: S105  no password, whatever the word says


class KvGradient(enum.StrEnum):
    TRUNCATED = "Truncated"
    DENSE = "Dense"


class RowActivations(enum.StrEnum):
    KEEP = "Keep"
    RECOMPUTE = "Recompute"


class GatingSpec(Spec):
    """Confidence-gated gradient routing: which tokens the backward pass is spent on."""

    strategy: GatingStrategy = GatingStrategy.OFF
    """Score that ranks tokens. GradientNorm: |softmax - onehot|, the measured best. Disabled: no token is left out."""
    selection: GatingSelection = GatingSelection.SAMPLED
    """Sampled: drawn with probability proportional to the score and weighted by its inverse, so that the gradient is
    unbiased. Top: the highest scores only, which is biased."""
    token_ratio: float = Field(default=0.5, gt=0, le=1)
    """Share of tokens that carry gradient once warm-up is over; 1 keeps all."""
    warmup_steps: int = Field(default=0, ge=0, le=2**53)
    """Steps over which the ratio falls linearly from 1 to tokenRatio; 0 starts at tokenRatio."""
    engine: GatingEngine = GatingEngine.HEAD_ONLY
    """How far the backward pass shrinks to the chosen tokens. HeadOnly: in the head; exact. SinglePass: in every block;
    faster, but tokens that were not chosen get no gradient through attention (see kvGradient)."""
    kv_gradient: KvGradient = KvGradient.TRUNCATED
    """SinglePass only: gradient that chosen tokens send to the keys and values of the others. Truncated: ends there.
    Dense: reaches the block's key and value weights, at the cost of their whole backward pass, and ends below."""
    row_activations: RowActivations = RowActivations.KEEP
    """SinglePass only: what the backward pass starts from. Keep: outputs of every linear layer, in as much memory as
    the plain step's. Recompute: a hidden state, keys and values per block; the chosen tokens' forward runs again."""


class RestoreSpec(Spec):
    """A checkpoint of another run to start from."""

    uri: Uri
    """Directory of the other run's checkpoints (its status.checkpoint.uri), any fsspec URI."""
    step: Count | None = None
    """Step to start from. Unset: the newest committed one."""


class CheckpointSpec(Spec):
    """Where and how often training is saved. Without a uri nothing is saved and a restart begins anew."""

    uri: Uri
    """Root directory, any fsspec URI. A job saves under `<uri>/<namespace>/<name>-<first 8 of its uid>`, so jobs never
    share a directory."""
    interval_steps: int = Field(default=500, ge=0, le=2**53)
    """Steps between checkpoints; 0 saves only at the end, on request and when stopped."""
    keep: int = Field(default=2, ge=1, le=1000)
    """Committed checkpoints to keep; an older one goes only after a newer one is durable."""
    restore_from: RestoreSpec | None = None
    """A checkpoint of another run to start from, when this job has none of its own yet."""


class EvaluationSpec(Spec):
    """Held-out loss and samples while training."""

    interval_steps: int = Field(default=500, ge=0, le=2**53)
    """Steps between evaluations; 0 evaluates only at the end."""
    sequences: int = Field(default=64, ge=1, le=1048576)
    """Held-out sequences per evaluation, the same ones every time."""
    sample_prompt: str = Field(default="", max_length=4096)
    """Text that a sample at the end of training continues; empty switches sampling off."""
    sample_tokens: int = Field(default=200, ge=1, le=8192)
    """Tokens to generate for the sample."""


class ExportFormat(enum.StrEnum):
    OFF = "Disabled"  # YAML 1.1 reads a bare Off as false
    HUGGING_FACE = "HuggingFace"


class ExportSpec(Spec):
    """What is left when training has ended."""

    format: ExportFormat = ExportFormat.OFF
    """HuggingFace: safetensors and config.json that LlamaForCausalLM loads, with the tokenizer. Disabled: nothing."""
    uri: Uri | None = None
    """Directory, any fsspec URI. Unset: `export` under the job's checkpoint directory."""


class TrainingSpec(Spec):
    """The whole recipe of a run. It cannot change while the job exists: make another job for another recipe."""

    model: ModelSpec = ModelSpec()
    """The network."""
    data: DataSpec
    """Where the text is and how it becomes sequences."""
    optimizer: OptimizerSpec = OptimizerSpec()
    """How gradients become updates."""
    schedule: ScheduleSpec
    """How long training runs and how the learning rate moves."""
    batch: BatchSpec = BatchSpec()
    """How much data goes into a step."""
    precision: Precision = Precision.BFLOAT16
    """BFloat16: autocast with float32 weights and optimizer state. Float32: everything in float32."""
    compile: Compile = Compile.OFF
    """Default: torch.compile of every block. Disabled: eager."""
    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    """Fixes initialisation, data order and gating; the same seed on the same machines gives the same losses."""
    gating: GatingSpec = GatingSpec()
    """Which tokens the backward pass is spent on."""
    checkpoint: CheckpointSpec | None = None
    """Where and how often training is saved. Unset: nothing is saved."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """Held-out loss and samples."""
    export: ExportSpec = ExportSpec()
    """What is left when training has ended."""
    log_interval_steps: int = Field(default=10, ge=1, le=1000000)
    """Steps between updates of loss and tokens/s in the status and the log."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!has(self.export) || self.export.format == 'Disabled' || has(self.export.uri) || has(self.checkpoint)",
                "export needs export.uri or checkpoint.uri to know where to write",
            ),
        )
    )

    @model_validator(mode="after")
    def _export_has_a_place(self) -> Self:
        if self.export.format is not ExportFormat.OFF and not (self.export.uri or self.checkpoint):
            raise ValueError("export needs export.uri or checkpoint.uri to know where to write")
        return self
