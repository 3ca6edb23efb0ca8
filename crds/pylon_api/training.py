"""`spec.training`: what is trained, on what, and how. The operator passes it on untouched; the trainer obeys it.

Every description gives meaning, unit, default and how to switch the thing off, because `kubectl explain` prints it.
Limits that need a look at the data (vocabulary, files, devices) are the trainer's to check.
"""

from __future__ import annotations

import enum
import re
from typing import Annotated, Self

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from pylon_api.base import Spec, rule, rules

_USERINFO = "://[^/@]*:[^/]*@"
"""`user:password@` before the host. `container@account`, as Azure has it, holds no secret."""
_USERINFO_REFUSED = (
    "a URI must not hold a password, because everyone who may read the job would read it: "
    "give the pods credentials from a Secret, as environment variables or a mounted file, by spec.template"
)
HIDDEN_INPUT = "hidden_input"
"""Type of the validation errors whose input must not be shown."""


def _refuse_userinfo(uri: str) -> str:
    if re.search(_USERINFO, uri):
        raise PydanticCustomError(HIDDEN_INPUT, _USERINFO_REFUSED)
    return uri


Uri = Annotated[
    str,
    StringConstraints(min_length=1, max_length=2048),
    AfterValidator(_refuse_userinfo),
    Field(json_schema_extra=rules(rule(f"!self.matches('{_USERINFO}')", _USERINFO_REFUSED))),
]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=2**53)]


class Architecture(enum.StrEnum):
    TRANSFORMER = "Transformer"
    RESONATE = "Resonate"


class ScanKernel(enum.StrEnum):
    AUTO = "Auto"
    PYTORCH = "PyTorch"


class ControlSpec(Spec):
    """A small network, the controller, that reads how training goes and advises the blocks by a vector (the resonance
    vector), and a bound on how far one step may move a block. Every field can be left alone."""

    outer_every_steps: int = Field(default=32, ge=8, le=64)
    """Optimizer steps for which the advice stays as it is. At the end of each such turn the controller learns from one
    more micro-batch and speaks anew."""
    vector_size: int = Field(default=512, ge=8, le=4096)
    """Numbers of the advice."""


class Activation(enum.StrEnum):
    SILU = "Silu"
    GELU = "Gelu"
    RELU = "Relu"
    BINLOP = "Binlop"


class AdaptationBase(enum.StrEnum):
    ZERO = "Zero"
    SEED = "Seed"
    DENSE = "Dense"


class CodebookSpec(Spec):
    """Atoms that all layers share, and by which adapted layers answer to their context."""

    sub_keys: int = Field(default=256, ge=2, le=4096)
    """Sub-keys of each half of an address. There are subKeys x subKeys atoms, 65,536 by default; a lookup costs
    2 x subKeys x width multiplications."""
    width: int = Field(default=64, ge=4, le=1024)
    """Numbers of an atom and of a sub-key; a multiple of 4, the number of spans of a summary."""
    top_k: int = Field(default=4, ge=1, le=64)
    """Atoms that a token mixes in a block."""
    revive_every_steps: int = Field(default=500, ge=0, le=2**53)
    """Steps between looks at how often atoms are used by all ranks; sub-keys hardly used are then moved next to those
    used most. Each look sends 4 bytes for every atom. 0 never looks."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("self.topK <= self.subKeys", "topK must not exceed subKeys"),
            rule("self.width % 4 == 0", "width must be a multiple of 4"),
        )
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.top_k > self.sub_keys:
            raise ValueError(f"topK {self.top_k} must not exceed subKeys {self.sub_keys}")
        if self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of 4")
        return self


class AdaptationSpec(Spec):
    """Large linear layers as W0 x + A (s * (B x)), with A and B of few ranks. Every field can be left alone."""

    base: AdaptationBase = AdaptationBase.SEED
    """What W0 is. Zero: nothing; layers can write in as many directions as they have ranks. Seed: random, the same at
    every start, never learnt, sent or saved. Dense: learnt weights, those of the run in checkpoint.restoreFrom,
    which do not change before unfreezeStep, so that only what is added, norms, embeddings and the head learn."""
    base_seed: int = Field(default=0, ge=0, le=2**31 - 1)
    """What base Seed is generated from."""
    rank: int = Field(default=8, ge=1, le=4096)
    """Ranks in use at first."""
    maximum_rank: int = Field(default=32, ge=1, le=4096)
    """Ranks in use at last. They are allocated from the start, so that growing changes no shape; memory, compute and
    bytes are always those of maximumRank."""
    grow_every_steps: int = Field(default=1000, ge=0, le=2**53)
    """Steps after which the ranks in use double, until they are maximumRank; the function stays the same at each
    growth. 0 keeps to rank, and allocates no more."""
    unfreeze_step: int | None = Field(default=None, ge=0, le=2**53)
    """Base Dense only: the step from which W0 learns too, from the plain model's random weights where
    checkpoint.restoreFrom is unset. Unset: it never learns."""
    base_sync_steps: int = Field(default=128, ge=1, le=65536)
    """Steps whose gradients of W0 are added up by every rank, summed exactly over ranks and applied as one update, once
    it learns."""
    codebook: CodebookSpec | None = None
    """Lets s answer to the tokens so far, by a small network per block and atoms that all blocks share. Unset: s is
    1."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "self.growEverySteps == 0 || self.rank <= self.maximumRank",
                "rank must not exceed maximumRank; growEverySteps 0 ignores maximumRank",
            ),
            rule("!has(self.unfreezeStep) || self.base == 'Dense'", "unfreezeStep needs base Dense"),
        )
    )

    @model_validator(mode="after")
    def _ranks_fit(self) -> Self:
        if self.grow_every_steps and self.rank > self.maximum_rank:
            raise ValueError(
                f"rank {self.rank} must not exceed maximumRank {self.maximum_rank}; "
                f"growEverySteps 0 ignores maximumRank"
            )
        if self.unfreeze_step is not None and self.base is not AdaptationBase.DENSE:
            raise ValueError(f"unfreezeStep needs base Dense, not {self.base}")
        return self

    @property
    def allocated_rank(self) -> int:
        """Ranks there will ever be."""
        return self.maximum_rank if self.grow_every_steps else self.rank

    def rank_at(self, step: int) -> int:
        """Ranks in use after so many steps."""
        doublings = step // self.grow_every_steps if self.grow_every_steps else 0
        return min(self.allocated_rank, self.rank << min(doublings, 12))


class StabilitySpec(Spec):
    """Bounds on what a block adds to the residual stream."""

    branch_norm_limit: float = Field(default=1.0, gt=0, le=1000)
    """Largest norm of what a mixer, attention or MLP adds to a token, as a share of the token's own norm before; more
    is scaled down to it."""


class ResonateSpec(Spec):
    """What the Resonate architecture has of its own. Every field can be left alone."""

    state_size: int = Field(default=64, ge=1, le=256)
    """Numbers that a head remembers per channel: more recall, more memory traffic. 64 and 128 suit GPUs."""
    head_width: int = Field(default=64, ge=1, le=256)
    """Channels that share a pole. expand x hiddenSize must be divisible by it."""
    expand: int = Field(default=2, ge=1, le=8)
    """Channels of the state-space layer per unit of hiddenSize."""
    conv_width: int = Field(default=4, ge=1, le=16)
    """Tokens that the short causal convolution before the scan weighs, the last of them the token itself; with 1 no
    token is weighed but that."""
    groups: int = Field(default=1, ge=1, le=256)
    """Sets of input and output maps of the state; the heads must be divisible by it."""
    chunk_tokens: int = Field(default=64, ge=1, le=1024)
    """Tokens that a scan or a long convolution in PyTorch takes at a time as one product of matrices. It changes speed
    and memory, not results; the scan's Triton kernels choose for themselves."""
    attention_every: int = Field(default=8, ge=0, le=1024)
    """One block of every so many attends instead of scanning, the middle one: with 8 blocks 5, 13, 21, ... A model of
    fewer has one, in its middle. That restores exact recall at a cost that grows with the sequence. 1 makes all blocks
    so, 0 none."""
    long_convolution_every: int = Field(default=0, ge=0, le=1024)
    """One block of every so many, the last one, convolves over the whole past with a learnt filter that does not depend
    on the tokens, instead of scanning, and of attending where attentionEvery falls on the same. A model of fewer has
    one, its last. 1 makes all blocks so, 0 none."""
    activation: Activation = Activation.SILU
    """Of the gate in every MLP. Binlop: straight lines with two knees, odd and invertible, whose knees and slopes each
    layer learns; of magnitude at least binlopMinimumSlope everywhere, so it never saturates."""
    binlop_minimum_slope: float = Field(default=0.5, gt=0, lt=1)
    """Binlop only: the least slope that it may learn. Near 1 it is almost the identity; a small one may bend as sharply
    as a ReLU does on one side, and lets gradients vanish."""
    scan_kernel: ScanKernel = ScanKernel.AUTO
    """Auto: Triton kernels on CUDA, else PyTorch. PyTorch: the scan in PyTorch's own operations, to compare with; with
    compile they are fused, and on CUDA slower than the kernels."""
    control: ControlSpec | None = None
    """The controller, and the ports by which its advice enters the blocks. Unset: there is none; {} takes defaults."""
    stability: StabilitySpec | None = None
    """Bounds on what a block adds to the residual stream. Unset: none."""
    adaptation: AdaptationSpec | None = None
    """Large linear layers with few learnt ranks beside weights that do not learn. Unset: all weights learn."""


class ModelSpec(Spec):
    """The network. Defaults are the quickstart's: a byte-level Transformer that trains on two CPU cores."""

    architecture: Architecture = Architecture.TRANSFORMER
    """Transformer: pre-norm decoder with RoPE, SwiGLU, grouped-query attention and RMSNorm. Resonate: the same with a
    state-space scan (Mamba-2) in place of attention but in one block of eight; a scan's work per token does not grow
    with the sequence."""
    layers: int = Field(default=4, ge=1, le=1024)
    """Number of blocks."""
    hidden_size: int = Field(default=128, ge=8, le=65536)
    """Width of the residual stream."""
    heads: int = Field(default=4, ge=1, le=1024)
    """Query heads. hiddenSize must be divisible by it, with an even quotient (RoPE turns pairs)."""
    kv_heads: int | None = Field(default=None, ge=1, le=1024)
    """Key and value heads; heads must be divisible by it. Unset: as many as heads (no grouping)."""
    intermediate_size: int | None = Field(default=None, ge=8, le=262144)
    """Inner width of the gated MLP. Unset: 8/3 of hiddenSize, rounded up to a multiple of 64."""
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
    resonate: ResonateSpec | None = None
    """Details of the Resonate architecture, and only of it. Unset: their defaults."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("self.hiddenSize % (self.heads * 2) == 0", "hiddenSize must be divisible by 2 x heads"),
            rule("!has(self.kvHeads) || self.heads % self.kvHeads == 0", "heads must be divisible by kvHeads"),
            rule(
                "!has(self.resonate) || self.architecture == 'Resonate'",
                "resonate goes with architecture Resonate, and only with it",
            ),
            rule(
                "has(self.resonate) ? self.hiddenSize * self.resonate.expand % self.resonate.headWidth == 0"
                " : self.architecture != 'Resonate' || self.hiddenSize % 32 == 0",
                "hiddenSize x resonate.expand must be divisible by resonate.headWidth",
            ),
            rule(
                "!has(self.resonate) || self.hiddenSize * self.resonate.expand"
                " % (self.resonate.headWidth * self.resonate.groups) == 0",
                "the heads (hiddenSize x resonate.expand / resonate.headWidth) must be divisible by resonate.groups",
            ),
            rule(
                "!has(self.resonate) || !has(self.resonate.adaptation) || self.hiddenSize >"
                " (self.resonate.adaptation.growEverySteps == 0 ? self.resonate.adaptation.rank"
                " : self.resonate.adaptation.maximumRank)",
                "resonate.adaptation needs fewer ranks than hiddenSize",
            ),
        )
    )

    @property
    def adaptation(self) -> AdaptationSpec | None:
        """What is adapted, if anything is."""
        return None if self.resonate is None else self.resonate.adaptation

    @property
    def export_problem(self) -> str | None:
        """Why it has no form in Hugging Face's files, in one line for people; None: it has one."""
        own = self.resonate or ResonateSpec()
        for field, value, needed in (
            ("longConvolutionEvery", own.long_convolution_every, 0),
            ("groups", own.groups, 1),  # transformers up to 5.17 norms all of them together
            ("activation", own.activation, Activation.SILU),
            ("control", own.control, None),
            ("stability", own.stability, None),
            ("adaptation.codebook", own.adaptation and own.adaptation.codebook, None),
        ):
            if value != needed:
                rest = "unset" if needed is None else f"{needed}, not {value}"
                return (
                    f"export.format HuggingFace needs model.resonate.{field} {rest}: transformers has no form for it; "
                    f"or set Disabled and use the checkpoint"
                )
        return None

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hiddenSize {self.hidden_size} must be divisible by 2 x heads ({2 * self.heads})")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} must be divisible by kvHeads {self.kv_heads}")
        return self

    @model_validator(mode="after")
    def _resonate_fits(self) -> Self:
        if self.architecture is not Architecture.RESONATE:
            if self.resonate is not None:
                raise ValueError(f"resonate goes with architecture Resonate, not {self.architecture}")
            return self
        own = self.resonate or ResonateSpec()
        channels = self.hidden_size * own.expand
        if channels % own.head_width:
            raise ValueError(
                f"hiddenSize {self.hidden_size} x resonate.expand {own.expand} must be divisible by "
                f"resonate.headWidth {own.head_width}"
            )
        if channels // own.head_width % own.groups:
            raise ValueError(
                f"the {channels // own.head_width} heads (hiddenSize x resonate.expand / resonate.headWidth) must be "
                f"divisible by resonate.groups {own.groups}"
            )
        adaptation = own.adaptation
        if adaptation is not None and adaptation.allocated_rank >= self.hidden_size:
            raise ValueError(
                f"resonate.adaptation needs fewer ranks ({adaptation.allocated_rank}) than hiddenSize "
                f"{self.hidden_size}; set a lower {'maximumRank' if adaptation.grow_every_steps else 'rank'}"
            )
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
    MUON = "Muon"
    ADAFACTOR = "Adafactor"
    LION = "Lion"
    SOPHIA = "Sophia"


_MOMENTS = (OptimizerName.ADAMW, OptimizerName.MUON, OptimizerName.LION, OptimizerName.SOPHIA)
_OPTIMIZERS_WITH = {
    "beta1": _MOMENTS,
    "beta2": _MOMENTS,
    "epsilon": (OptimizerName.ADAMW, OptimizerName.MUON, OptimizerName.SOPHIA),
    "momentum": (OptimizerName.MUON,),
    "curvature_steps": (OptimizerName.SOPHIA,),
}
"""Fields of an optimizer that not all optimizers have."""


class LookaheadSpec(Spec):
    """Slow weights that follow the optimizer's, and to which those return."""

    steps: int = Field(default=5, ge=1, le=2**53)
    """Updates between two meetings."""
    ratio: float = Field(default=0.5, gt=0, le=1)
    """Share of the way from the slow weights to the optimizer's at which they meet; 1 makes no difference."""


class OptimizerSpec(Spec):
    """How gradients become updates."""

    name: OptimizerName = OptimizerName.ADAMW
    """AdamW: with decoupled weight decay. Muon: the matrices inside the network move by orthogonalised momentum, and
    the rest by AdamW; AdamW's learning rates hold. Lion: by the sign of a momentum; wants a third to a tenth of AdamW's
    learning rate and as much more weight decay. Adafactor: second moments by row and column alone; wants about 30 times
    AdamW's learning rate, as steps go by the size of the weights. Sophia: momentum over the curvature, which it looks
    at every curvatureSteps; AdamW's learning rate times 0.8. State in bytes a parameter: AdamW and Sophia 8, Muon and
    Lion 4, Adafactor none to speak of. None of them decays vectors, such as those of norms."""
    learning_rate: float = Field(default=3e-4, gt=0, le=10)
    """Peak learning rate."""
    beta1: float | None = Field(default=None, ge=0, lt=1)
    """Decay of the first moment, which Adafactor has not. Unset: 0.9, with Sophia 0.965."""
    beta2: float | None = Field(default=None, ge=0, lt=1)
    """Decay of the second moment, with Lion of the momentum, with Sophia of the curvature; Adafactor has its own way.
    Unset: 0.95, with Lion and Sophia 0.99."""
    epsilon: float | None = Field(default=None, gt=0, lt=1)
    """Added to the root of the second moment, by AdamW and Muon; with Sophia the least curvature. Unset: 1e-8, with
    Sophia 1e-15."""
    momentum: float | None = Field(default=None, ge=0, lt=1)
    """Muon only: decay of the momentum of its matrices. Unset: 0.95."""
    curvature_steps: int | None = Field(default=None, ge=1, le=2**53)
    """Sophia only: updates between two looks at the curvature, each at the cost of more than a plain step. Unset:
    10."""
    weight_decay: float = Field(default=0.1, ge=0, le=10)
    """Decoupled weight decay per unit of learning rate; 0 switches it off."""
    gradient_clip_norm: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 switches clipping off."""
    lookahead: LookaheadSpec | None = None
    """Slow weights beside the optimizer's, with any of them, for 4 bytes a parameter more. Unset: none."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            *(
                rule(
                    f"!has(self.{to_camel(field)}) || self.name in [{', '.join(repr(name.value) for name in names)}]",
                    f"{to_camel(field)} goes with {', '.join(names)}, and with no other optimizer",
                )
                for field, names in _OPTIMIZERS_WITH.items()
            )
        )
    )

    @model_validator(mode="after")
    def _fields_are_of_this_optimizer(self) -> Self:
        for field, names in _OPTIMIZERS_WITH.items():
            if getattr(self, field) is not None and self.name not in names:
                raise ValueError(f"{to_camel(field)} goes with {', '.join(names)}, not with {self.name}: leave it out")
        return self


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
    GRAPH = "Graph"


class Recompute(enum.StrEnum):
    MIXERS = "Mixers"
    BLOCKS = "Blocks"


class GatingStrategy(enum.StrEnum):
    OFF = "Disabled"  # YAML 1.1 reads a bare Off as false
    GRADIENT_NORM = "GradientNorm"
    ENTROPY = "Entropy"
    LOSS = "Loss"
    MARGIN = "Margin"
    COMBINED = "Combined"
    DIFFICULTY = "Difficulty"
    RANDOM = "Random"


class GatingSelection(enum.StrEnum):
    SAMPLED = "Sampled"
    TOP = "Top"
    STRATIFIED = "Stratified"
    SEQUENCE_AWARE = "SequenceAware"


class GatingGranularity(enum.StrEnum):
    TOKEN = "Token"  # noqa: S105  no password, whatever the word says
    SEQUENCE = "Sequence"


class RatioControl(enum.StrEnum):
    FIXED = "Fixed"
    GRADIENT_MASS = "GradientMass"


class GatingFallback(enum.StrEnum):
    MEASURED = "Measured"
    NEVER = "Never"


class GatingEngine(enum.StrEnum):
    HEAD_ONLY = "HeadOnly"
    SINGLE_PASS = "SinglePass"  # noqa: S105
    TWO_PASS = "TwoPass"  # noqa: S105


class KvGradient(enum.StrEnum):
    TRUNCATED = "Truncated"
    DENSE = "Dense"


class RowActivations(enum.StrEnum):
    KEEP = "Keep"
    RECOMPUTE = "Recompute"


class GatingSpec(Spec):
    """Confidence-gated gradient routing: which tokens the backward pass is spent on.

    With `strategy` alone the gate follows the gradient mass and takes plain steps wherever gated ones would not pay.
    """

    strategy: GatingStrategy = GatingStrategy.OFF
    """Score that ranks tokens. GradientNorm: |softmax - onehot|, the measured best. Entropy and Loss: in nats. Margin:
    1 minus the lead of the likeliest token. Difficulty: entropy plus 1 minus the probability of the likeliest token.
    Combined: Difficulty plus Margin. Random: all alike, for comparison. Disabled: no token is left out."""
    selection: GatingSelection = GatingSelection.SAMPLED
    """Sampled: drawn with probability proportional to the score and weighted by its inverse, so that the gradient is
    unbiased. Stratified: the same by strata of like score, one probability for all tokens of a stratum. SequenceAware:
    the same, with a share of the tokens dealt out evenly to the sequences first. Top: the highest scores only, which is
    biased."""
    strata: int = Field(default=4, ge=2, le=64)
    """Stratified only: strata of equal size that the ranked tokens are cut into."""
    sequence_share: Fraction = 0.5
    """SequenceAware only: share of the chosen tokens that is dealt out evenly to the sequences before the rest goes by
    score; 1 is a fixed quota per sequence, 0 none. A sequence with fewer labels than its quota leaves the rest to
    others."""
    granularity: GatingGranularity = GatingGranularity.TOKEN
    """Token: tokens are chosen by the model's own output. Sequence: whole sequences are chosen by the model's lowest
    blocks (see routerLayers), and only those run through the whole model."""
    router_layers: int | None = Field(default=None, ge=1, le=1024)
    """Sequence granularity only: blocks of the model, counted from below, that score the sequences through its own
    head. Unset: a quarter of them."""
    ratio_control: RatioControl = RatioControl.GRADIENT_MASS
    """GradientMass: the smallest share of tokens whose scores hold targetMass of the gradient norms, followed while
    training. Fixed: tokenRatio throughout, so that two runs of one seed are the same bit for bit."""
    token_ratio: float = Field(default=0.5, gt=0, le=1)
    """Share of tokens that carry gradient once warm-up is over; 1 keeps all. With GradientMass it is the
    ratio of gated steps before anything has been measured."""
    warmup_steps: int = Field(default=0, ge=0, le=2**53)
    """Steps over which the ratio falls linearly from 1; 0 switches it off."""
    final_token_ratio: float | None = Field(default=None, gt=0, le=1)
    """Fixed only: share of tokens at the end of decaySteps, at most tokenRatio. Unset: tokenRatio throughout."""
    decay_steps: int = Field(default=0, ge=0, le=2**53)
    """Steps after the warm-up over which the ratio falls linearly from tokenRatio to finalTokenRatio; goes with it,
    and 0 without."""
    target_mass: float = Field(default=0.9, gt=0, le=1)
    """GradientMass only: share of the sum of all tokens' gradient norms that the tokens of highest score must hold."""
    minimum_token_ratio: float = Field(default=0.125, gt=0, le=1)
    """GradientMass only: the ratio never falls below it."""
    maximum_token_ratio: float = Field(default=1.0, gt=0, le=1)
    """GradientMass only: the ratio of a gated step never exceeds it; 1 lets it rise to the plain step."""
    fallback: GatingFallback = GatingFallback.MEASURED
    """GradientMass only. Measured: plain steps while no gated step would pay, that is learn more per second by the
    statistics of the scores and the measured time of steps; two runs of one seed may then differ in which steps are
    gated. Never: no step's time is looked at, and two runs of one seed are the same."""
    engine: GatingEngine = GatingEngine.HEAD_ONLY
    """How far the backward pass shrinks to the chosen tokens. HeadOnly: in the head; exact. SinglePass: in every block;
    faster, but tokens that were not chosen get no gradient through attention (see kvGradient). TwoPass: like SinglePass
    with rows recomputed from a first pass without gradients, in memory that falls with the ratio."""
    kv_gradient: KvGradient = KvGradient.TRUNCATED
    """SinglePass only: gradient that chosen tokens send to the keys and values of the others. Truncated: ends there.
    Dense: reaches the block's key and value weights, at the cost of their whole backward pass, and ends below."""
    row_activations: RowActivations = RowActivations.KEEP
    """SinglePass: what the backward pass starts from. Keep: outputs of every linear layer, in as much memory as the
    plain step's. Recompute: a hidden state, keys and values per block; the chosen tokens' forward runs again. TwoPass:
    of the chosen tokens alone."""
    depth_buckets: int = Field(default=1, ge=1, le=4)
    """SinglePass and TwoPass: tiers that the chosen tokens are cut into by score. The gradient of the first goes back
    over all blocks, that of the others ends higher up: with 4 tiers after 100, 75, 50 and 25 percent of them. The
    warm-up opens one tier after the other. 1 switches it off."""
    leak_rate: Fraction = 0.0
    """With depthBuckets above 1: share of the tokens that would leave at some block which are drawn to go on all the
    same, weighted by its inverse, so that the gradient below stays unbiased; 0 is none, and biased."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "self.minimumTokenRatio <= self.maximumTokenRatio",
                "minimumTokenRatio must not exceed maximumTokenRatio",
            ),
            rule("has(self.finalTokenRatio) == (self.decaySteps > 0)", "finalTokenRatio and decaySteps go together"),
            rule(
                "!has(self.finalTokenRatio) || self.finalTokenRatio <= self.tokenRatio",
                "finalTokenRatio must not exceed tokenRatio",
            ),
            rule(
                "!has(self.finalTokenRatio) || self.ratioControl == 'Fixed'",
                "finalTokenRatio needs ratioControl Fixed: GradientMass finds its own way down",
            ),
            rule(
                "self.depthBuckets == 1 || self.engine != 'HeadOnly'",
                "depthBuckets above 1 needs engine SinglePass or TwoPass",
            ),
            rule(
                "self.kvGradient == 'Truncated' || self.engine == 'SinglePass'",
                "kvGradient Dense needs engine SinglePass",
            ),
            rule(
                "self.rowActivations == 'Keep' || self.engine != 'HeadOnly'",
                "rowActivations Recompute needs engine SinglePass or TwoPass",
            ),
            rule("self.leakRate == 0.0 || self.depthBuckets > 1", "leakRate needs depthBuckets above 1"),
            rule(
                "self.granularity == 'Token' || self.engine == 'HeadOnly'",
                "granularity Sequence needs engine HeadOnly: chosen sequences run through the whole model",
            ),
            rule(
                "self.granularity == 'Token' || self.selection in ['Sampled', 'Top']",
                "granularity Sequence needs selection Sampled or Top",
            ),
            rule(
                "!has(self.routerLayers) || self.granularity == 'Sequence'",
                "routerLayers needs granularity Sequence",
            ),
        )
    )

    @model_validator(mode="after")
    def _ratios_fit(self) -> Self:
        lowest, highest = self.minimum_token_ratio, self.maximum_token_ratio
        if lowest > highest:
            raise ValueError(f"minimumTokenRatio {lowest} must not exceed maximumTokenRatio {highest}")
        final = self.final_token_ratio
        if (final is not None) != (self.decay_steps > 0):
            raise ValueError("finalTokenRatio and decaySteps go together: set both or neither")
        if final is not None and final > self.token_ratio:
            raise ValueError(f"finalTokenRatio {final} must not exceed tokenRatio {self.token_ratio}")
        if final is not None and self.ratio_control is not RatioControl.FIXED:
            raise ValueError("finalTokenRatio needs ratioControl Fixed: GradientMass finds its own way down")
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.depth_buckets > 1 and self.engine is GatingEngine.HEAD_ONLY:
            raise ValueError("depthBuckets above 1 needs engine SinglePass or TwoPass, not HeadOnly")
        if self.kv_gradient is KvGradient.DENSE and self.engine is not GatingEngine.SINGLE_PASS:
            raise ValueError(f"kvGradient Dense needs engine SinglePass, not {self.engine}")
        if self.row_activations is RowActivations.RECOMPUTE and self.engine is GatingEngine.HEAD_ONLY:
            raise ValueError("rowActivations Recompute needs engine SinglePass or TwoPass, not HeadOnly")
        if self.leak_rate > 0 and self.depth_buckets == 1:
            raise ValueError("leakRate needs depthBuckets above 1")
        if self.granularity is GatingGranularity.SEQUENCE:
            if self.engine is not GatingEngine.HEAD_ONLY:
                raise ValueError(
                    f"granularity Sequence needs engine HeadOnly, not {self.engine}: "
                    f"chosen sequences run through the whole model"
                )
            if self.selection not in (GatingSelection.SAMPLED, GatingSelection.TOP):
                raise ValueError(f"granularity Sequence needs selection Sampled or Top, not {self.selection}")
        elif self.router_layers is not None:
            raise ValueError("routerLayers needs granularity Sequence")
        return self


class ConsensusCodec(enum.StrEnum):
    AUTO = "Auto"
    EXACT = "Exact"
    INT8 = "Int8"
    INT4 = "Int4"
    SIGN = "Sign"
    SKETCH = "Sketch"
    SPARSE_ROWS = "SparseRows"
    DCT = "Dct"

    @property
    def fills_budget(self) -> bool:
        """Whether it is made as large as a budget allows; others have one size."""
        return self in (self.AUTO, self.DCT, self.SKETCH, self.SPARSE_ROWS)


class Disagreement(enum.StrEnum):
    HEAL = "Heal"
    STOP = "Stop"


class ConsensusSpec(Spec):
    """How ranks turn their own gradients into one, and how many bytes that may take.

    Vectors (norms, biases) are few and go as floating-point numbers or Int8 whatever the codec.
    """

    codec: ConsensusCodec = ConsensusCodec.EXACT
    """Exact: the plain sum, in float32. Int8, Int4: integers with a scale per block. Sign: a bit for each value and a
    mean per block. Dct: the largest coefficients of a chunked cosine transform, a byte each. Sketch: a count-sketch
    with momentum and error feedback inside. SparseRows: the largest rows of embeddings, heads and codebooks, and Dct
    for all other matrices. Auto: whatever of these loses least within bytesPerStep (Sign and sketches left out), by
    group of tensors, measured on the first steps."""
    bytes_per_step: int | None = Field(default=None, ge=1, le=2**53)
    """Bytes that a rank may send in a step, all in, and as many that it may receive. Codecs with a size (Auto, Dct,
    Sketch, SparseRows) are given the largest that fits. Unset: 2,000,000 for those, no limit for Int8, Int4 and Sign.
    Exact knows no limit."""
    every_steps: int = Field(default=1, ge=1, le=1024)
    """Steps in which every value of matrices gets one turn to be exchanged, a different part in each step; 1 exchanges
    all in every step. Int8, Int4, Sign and Dct; to fit bytesPerStep, Auto and Dct may take more."""
    local_steps: int = Field(default=1, ge=1, le=1024)
    """Optimizer steps that every rank takes alone between two exchanges of a weight. Ranks then exchange how far their
    weights went from those they last agreed on, a different part of the model after each step, so that a step takes
    about a localSteps-th of the bytes. Auto then takes the most exact codec that fits bytesPerStep, Sign among them. 1:
    gradients are exchanged instead, before each update. A single rank exchanges nothing either way."""
    outer_rate: float = Field(default=1.0, gt=0, le=10)
    """localSteps above 1 only: how far the shared weights go towards the mean of all ranks' weights, 1 being all the
    way."""
    outer_momentum: float = Field(default=0.0, ge=0, lt=1)
    """localSteps above 1 only: Nesterov momentum of the shared weights; 0 switches it off. m makes steps in
    one direction up to 1 / (1 - m) times as long."""
    error_feedback: bool = True
    """Whether what a codec loses is kept by the rank and goes with the next gradients; with localSteps above 1, whether
    it stays in the rank's own weights. Off, for comparison: it is gone."""
    hash_check_steps: int = Field(default=100, ge=0, le=2**53)
    """Steps between comparisons of all ranks' weights and optimizer state, by hash; 0 switches them off."""
    on_disagreement: Disagreement = Disagreement.HEAL
    """What happens when they differ. Heal: all go on with rank 0's, and the status says so. Stop: the attempt ends as
    PeerLost, and the next goes on from the newest checkpoint."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!has(self.bytesPerStep) || self.codec != 'Exact'",
                "bytesPerStep needs a codec other than Exact, which knows no limit",
            ),
            rule(
                "self.everySteps == 1 || self.codec in ['Auto', 'Int8', 'Int4', 'Sign', 'Dct']",
                "everySteps needs codec Auto, Int8, Int4, Sign or Dct",
            ),
            rule(
                "self.localSteps == 1 || !(self.codec in ['Sketch', 'SparseRows'])",
                "localSteps needs codec Auto, Exact, Int8, Int4, Sign or Dct",
            ),
            rule(
                "self.localSteps == 1 || self.everySteps == 1",
                "localSteps exchanges a different part of the model after each step already: leave everySteps at 1",
            ),
        )
    )

    @model_validator(mode="after")
    def _codec_has_what_it_needs(self) -> Self:
        if self.bytes_per_step is not None and self.codec is ConsensusCodec.EXACT:
            raise ValueError("bytesPerStep needs a codec other than Exact, which knows no limit")
        without_turns = (ConsensusCodec.EXACT, ConsensusCodec.SKETCH, ConsensusCodec.SPARSE_ROWS)
        if self.every_steps > 1 and self.codec in without_turns:
            raise ValueError(f"everySteps needs codec Auto, Int8, Int4, Sign or Dct, not {self.codec}")
        return self

    @model_validator(mode="after")
    def _local_steps_fit(self) -> Self:
        if self.local_steps > 1:
            if self.codec in (ConsensusCodec.SKETCH, ConsensusCodec.SPARSE_ROWS):
                raise ValueError(f"localSteps needs codec Auto, Exact, Int8, Int4, Sign or Dct, not {self.codec}")
            if self.every_steps > 1:
                raise ValueError(
                    f"localSteps {self.local_steps} exchanges a different part of the model after each step already: "
                    f"leave everySteps at 1"
                )
        return self


_ONE_CHECKPOINT = "/(latest|step-[0-9]{12}-attempt-[0-9]{6}-[0-9a-f]{8})/*$"
_TWO_CHECKPOINTS = "uri names a checkpoint already: leave out step, or give uri without its last part"


class RestoreSpec(Spec):
    """A checkpoint of another run to start from."""

    uri: Uri
    """Any fsspec URI: of one checkpoint (the other job's status.checkpoint.uri), or of the directory that holds all of
    a run's, for the newest committed one; a last part `latest` says the same in a word."""
    step: Count | None = None
    """Committed step to start from, where uri is a run's directory. Unset: the newest."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(f"!has(self.step) || !self.uri.matches('{_ONE_CHECKPOINT}')", _TWO_CHECKPOINTS),
        )
    )

    @model_validator(mode="after")
    def _names_one_checkpoint(self) -> Self:
        if self.step is not None and re.search(_ONE_CHECKPOINT, self.uri):
            raise ValueError(_TWO_CHECKPOINTS)
        return self


class LocalCheckpointSpec(Spec):
    """Checkpoints on the disks of the nodes: read back in seconds while those nodes live, and no substitute for the
    store."""

    directory: Annotated[str, StringConstraints(pattern="^/", min_length=2, max_length=1024)]
    """Absolute path in the pod of a volume that outlives it, for example a hostPath mounted by `template`. A job saves
    below `<namespace>/<name>-<first 8 of its uid>` in it."""
    keep: int = Field(default=1, ge=1, le=1000)
    """Committed checkpoints to keep on each node, beside the one that is being written."""
    interval_steps: int = Field(default=0, ge=0, le=2**53)
    """Steps between checkpoints that stay on the nodes' disks, beside those that go to the store, each of which is
    written here too; 0 for those alone."""


class IntervalControl(enum.StrEnum):
    FIXED = "Fixed"
    YOUNG_DALY = "YoungDaly"


class CheckpointSpec(Spec):
    """Where and how often training is saved. Without a uri nothing is saved and a restart begins anew.

    Saving goes on beside training. Whichever interval ends first makes a checkpoint due; one that falls due while all
    of hostMemoryBytes is taken by those before it waits, and then holds the newest step.
    """

    uri: Uri
    """Root directory, any fsspec URI. A job saves under `<uri>/<namespace>/<name>-<first 8 of its uid>`, so jobs never
    share a directory."""
    interval_steps: int = Field(default=500, ge=0, le=2**53)
    """Steps between checkpoints, at most; 0 sets no limit in steps. With intervalSeconds 0 and intervalControl Fixed
    too, training is saved only at the end, on request and when stopped."""
    interval_seconds: int = Field(default=0, ge=0, le=31536000)
    """Seconds between checkpoints, at most, by the clock of rank 0; 0 sets no limit in seconds."""
    interval_control: IntervalControl = IntervalControl.FIXED
    """Fixed: intervalSteps and intervalSeconds decide. YoungDaly: so does the interval that loses least time in all,
    sqrt(2 x cost of a checkpoint x time between failures), from the measured cost and the failures of this job so
    far."""
    mean_seconds_between_failures: int = Field(default=21600, ge=1, le=31536000)
    """YoungDaly only: the first guess of the time between failures of the whole gang, in seconds; it counts as one
    failure beside those that this job has seen."""
    host_memory_bytes: int | None = Field(default=None, ge=1048576, le=2**53)
    """Host memory of one process for checkpoints on their way to the store; page-locked on CUDA. Unset: twice the
    process's share of the state, and at most a quarter of the container's memory over its processes. With room for one
    share, a checkpoint must be written before the next begins; with less, it goes through in pieces and training
    waits for all but the last."""
    keep: int = Field(default=2, ge=1, le=1000)
    """Committed checkpoints to keep; an older one goes only after a newer one is durable."""
    local: LocalCheckpointSpec | None = None
    """A copy of the newest checkpoints on the nodes' own disks, from which a restart reads first. Unset: none."""
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
    """HuggingFace: safetensors and config.json with the tokenizer, for LlamaForCausalLM, or of Resonate for
    GraniteMoeHybridForCausalLM, which has its scans and attention but not all of model.resonate. Disabled: nothing."""
    uri: Uri | None = None
    """Directory, any fsspec URI. Unset: `export` under the job's checkpoint directory."""


_ONE_CONTROL = (
    "model.resonate.control needs consensus.localSteps 1: its limit and its advice are for weights that all ranks share"
)
_ONE_SLOW_COPY = (
    "optimizer.lookahead needs consensus.localSteps 1: the shared weights of local steps are slow weights already"
)
_DENSE_NEEDS_WEIGHTS = (
    "model.resonate.adaptation.base Dense needs checkpoint.restoreFrom, a run of the same model without adaptation, or "
    "unfreezeStep; set base Seed for random weights that do not learn"
)
_RECORDED_GRADIENTS = (
    "model.resonate.adaptation.unfreezeStep needs compile Default or Disabled: Graph records steps in which the same "
    "weights learn"
)
_CURVATURE_OF_THE_BASE = (
    "model.resonate.adaptation.unfreezeStep needs an optimizer other than Sophia, which does not look at the base"
)


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
    """Default: torch.compile of every block. Graph: the same, and on CUDA every kind of step is recorded once as a CUDA
    graph and then replayed, but for steps of gating.granularity Sequence; for models whose kernels are shorter than
    their launches, up to a few hundred million parameters. Disabled: eager."""
    recompute: Recompute = Recompute.MIXERS
    """What the backward pass computes again in place of holding it. Mixers: what lies between the two projections of
    Resonate's mixers, which costs little. Blocks: every block from its input, for a fraction of the memory and about
    a third more work. It concerns steps in which all tokens carry gradient; others have gating.rowActivations."""
    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    """Fixes initialisation, data order and gating; the same seed on the same machines gives the same losses."""
    gating: GatingSpec = GatingSpec()
    """Which tokens the backward pass is spent on."""
    consensus: ConsensusSpec = ConsensusSpec()
    """How ranks turn their own gradients into one."""
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
            rule(
                "!has(self.gating) || !has(self.gating.routerLayers) || !has(self.model)"
                " || self.gating.routerLayers <= self.model.layers",
                "gating.routerLayers must not exceed model.layers",
            ),
            rule(
                "!has(self.optimizer) || self.optimizer.name != 'Sophia' || !has(self.consensus)"
                " || (self.consensus.codec == 'Exact' && self.consensus.localSteps == 1)",
                "optimizer Sophia needs consensus.codec Exact and localSteps 1: it sums its looks at the curvature so",
            ),
            rule(
                "!has(self.export) || self.export.format == 'Disabled' || !has(self.model) || !has(self.model.resonate)"
                " || (self.model.resonate.longConvolutionEvery == 0 && self.model.resonate.groups == 1"
                " && self.model.resonate.activation == 'Silu' && !has(self.model.resonate.control)"
                " && !has(self.model.resonate.stability) && (!has(self.model.resonate.adaptation)"
                " || !has(self.model.resonate.adaptation.codebook)))",
                "export.format HuggingFace needs model.resonate.longConvolutionEvery 0, groups 1, activation Silu, and "
                "control, stability and adaptation.codebook unset: transformers has no form for others",
            ),
            rule(
                "!has(self.optimizer) || !has(self.optimizer.lookahead) || !has(self.consensus)"
                " || self.consensus.localSteps == 1",
                _ONE_SLOW_COPY,
            ),
            rule(
                "!has(self.model) || !has(self.model.resonate) || !has(self.model.resonate.control)"
                " || !has(self.consensus) || self.consensus.localSteps == 1",
                _ONE_CONTROL,
            ),
            rule(
                "!has(self.model) || !has(self.model.resonate) || !has(self.model.resonate.adaptation)"
                " || self.model.resonate.adaptation.base != 'Dense'"
                " || has(self.model.resonate.adaptation.unfreezeStep)"
                " || (has(self.checkpoint) && has(self.checkpoint.restoreFrom))",
                _DENSE_NEEDS_WEIGHTS,
            ),
            rule(
                "!has(self.model) || !has(self.model.resonate) || !has(self.model.resonate.adaptation)"
                " || !has(self.model.resonate.adaptation.unfreezeStep) || !has(self.compile)"
                " || self.compile != 'Graph'",
                _RECORDED_GRADIENTS,
            ),
            rule(
                "!has(self.model) || !has(self.model.resonate) || !has(self.model.resonate.adaptation)"
                " || !has(self.model.resonate.adaptation.unfreezeStep) || !has(self.optimizer)"
                " || self.optimizer.name != 'Sophia'",
                _CURVATURE_OF_THE_BASE,
            ),
        )
    )

    @model_validator(mode="after")
    def _one_slow_copy(self) -> Self:
        if self.optimizer.lookahead is not None and self.consensus.local_steps > 1:
            raise ValueError(_ONE_SLOW_COPY)
        return self

    @model_validator(mode="after")
    def _one_control(self) -> Self:
        resonate = self.model.resonate
        if resonate is not None and resonate.control is not None and self.consensus.local_steps > 1:
            raise ValueError(_ONE_CONTROL)
        return self

    @model_validator(mode="after")
    def _export_has_a_place(self) -> Self:
        if self.export.format is not ExportFormat.OFF and not (self.export.uri or self.checkpoint):
            raise ValueError("export needs export.uri or checkpoint.uri to know where to write")
        return self

    @model_validator(mode="after")
    def _export_has_a_form(self) -> Self:
        if self.export.format is not ExportFormat.OFF and (problem := self.model.export_problem):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _dense_base_has_weights(self) -> Self:
        adaptation = self.model.adaptation
        if adaptation is None or adaptation.base is not AdaptationBase.DENSE:
            return self
        has_weights = self.checkpoint is not None and self.checkpoint.restore_from is not None
        learns = adaptation.unfreeze_step is not None
        if not (has_weights or learns):
            raise ValueError(_DENSE_NEEDS_WEIGHTS)
        if learns and self.compile is Compile.GRAPH:
            raise ValueError(_RECORDED_GRADIENTS)
        if learns and self.optimizer.name is OptimizerName.SOPHIA:
            raise ValueError(_CURVATURE_OF_THE_BASE)
        return self

    @model_validator(mode="after")
    def _curvature_is_summed_exactly(self) -> Self:
        codec, local_steps = self.consensus.codec, self.consensus.local_steps
        if self.optimizer.name is OptimizerName.SOPHIA and (codec is not ConsensusCodec.EXACT or local_steps > 1):
            raise ValueError(
                f"optimizer Sophia needs consensus.codec Exact and localSteps 1: it sums its looks at the curvature "
                f"so, not {codec} and {local_steps}"
            )
        return self

    @model_validator(mode="after")
    def _router_is_part_of_the_model(self) -> Self:
        routers, layers = self.gating.router_layers, self.model.layers
        if routers is not None and routers > layers:
            raise ValueError(f"gating.routerLayers {routers} must not exceed model.layers {layers}")
        return self
