"""Resonate: a decoder most of whose blocks let tokens meet in a state instead of in attention, so that their work per
token stays the same however long the sequence grows.

A block is a mixer and a gated MLP, each on a normed copy and added to the residual stream. Most mixers are Mamba-2
scans; a share of the blocks attends instead (exact recall), another may convolve with a fixed long filter.

Shapes: B sequences, T tokens, D hidden width.
"""

from __future__ import annotations

import enum
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pylon_api.training import Activation, Architecture, ModelSpec, ResonateSpec
from pylon_trainer.models.context import Context
from pylon_trainer.models.decoder import Block, Decoder, add_branch, norm_limit_of
from pylon_trainer.models.ports import Port, PortKind, norm_with
from pylon_trainer.models.resonate.adaptation import AdaptedBlock, Shared, adapt
from pylon_trainer.models.resonate.binlop import Binlop
from pylon_trainer.models.resonate.codebook import Codebook
from pylon_trainer.models.resonate.long_convolution import LongConvolution
from pylon_trainer.models.resonate.mamba import Mamba
from pylon_trainer.models.resonate.mixer import StateMixer
from pylon_trainer.models.transformer import AttentionBlock, GatedActivation, GatedMLP, intermediate_size, swiglu


class Resonate(Decoder):
    """State-space blocks, with as many that attend or convolve as the spec asks for."""

    advice_PR: Tensor | None

    def __init__(self, spec: ModelSpec, vocab_size: int) -> None:
        super().__init__(spec, vocab_size)
        self.shared: Shared | None = None
        """What its blocks share where their layers are adapted."""
        if spec.adaptation is not None:
            self.shared, self.generated = adapt(self, spec.adaptation)
        control = (spec.resonate or ResonateSpec()).control
        advice_PR = None if control is None else torch.zeros(len(PortKind), control.vector_size)
        # What the controller last said: written in place, so that a recorded step finds it where it was, and part of
        # the model, which it belongs to wherever that is used.
        self.register_buffer("advice_PR", advice_PR)
        if control is not None:
            for block in self.blocks:  # after all else has drawn its weights, which so are those of a model without
                block.open_ports(control.vector_size)

    @property
    def codebook(self) -> Codebook | None:
        """The one that its blocks mix, if they do."""
        return None if self.shared is None else self.shared.codebook

    def context(self, tokens_BT: Tensor, documents_BT: Tensor | None = None, *, first: int = 0) -> Context:
        """As Decoder has it."""
        context = super().context(tokens_BT, documents_BT, first=first)
        return context if self.advice_PR is None else replace(context, advice_PR=self.advice_PR)

    def _block(self, number: int) -> Block:
        is_adapted = self.spec.adaptation is not None
        mixer_block = AdaptedMixerBlock if is_adapted else MixerBlock
        match kind_of(self.spec, number):
            case Kind.ATTENTION:
                attention_block = AdaptedAttentionBlock if is_adapted else AttentionBlock
                return attention_block(self.spec, activation_of(self.spec))
            case Kind.LONG_CONVOLUTION:
                return mixer_block(self.spec, LongConvolution(self.spec))
            case Kind.SCAN:
                return mixer_block(self.spec, Mamba(self.spec))

    @property
    def attends(self) -> bool:
        """As Decoder has it."""
        return any(isinstance(block, AttentionBlock) for block in self.blocks)


class MixerBlock(Block):
    """A mixer, then the MLP, each on a normed copy and added to the residual stream."""

    def __init__(self, spec: ModelSpec, mixer: StateMixer) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(spec.hidden_size, eps=spec.norm_epsilon)
        self.mixer = mixer
        self.mlp_norm = nn.RMSNorm(spec.hidden_size, eps=spec.norm_epsilon)
        self.mlp = GatedMLP(spec.hidden_size, intermediate_size(spec), activation_of(spec))
        self.port_mlp: Port | None = None
        self.norm_limit = norm_limit_of(spec)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        x_BTD = add_branch(x_BTD, self.mixer(self.mixer_norm(x_BTD), context), self.norm_limit)
        normed_BTD = norm_with(self.mlp_norm, self.port_mlp, x_BTD, context)
        return add_branch(x_BTD, self.mlp(normed_BTD, context), self.norm_limit)

    def offers(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, ...]:
        """As Block has it: the mixer's first projection, B x T x I."""
        return self.mixer.offers(self.mixer_norm(x_BTD), context)

    def residual_outputs(self) -> tuple[nn.Linear, ...]:
        """As Block has it."""
        return self.mixer.output, self.mlp.down

    def open_ports(self, advice_size: int) -> None:
        """As Block has it."""
        self.port_mlp = Port(PortKind.MLP, advice_size, 2 * self.mlp_norm.normalized_shape[0])
        self.mixer.port_skip = Port(PortKind.SKIP, advice_size, len(self.mixer.skip))


def activation_of(spec: ModelSpec) -> GatedActivation:
    """Of one MLP's gate."""
    own = spec.resonate or ResonateSpec()
    match own.activation:
        case Activation.SILU:
            return swiglu
        case Activation.GELU:
            return geglu
        case Activation.RELU:
            return reglu
        case Activation.BINLOP:
            return Binlop(own.binlop_minimum_slope)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """GELU's gated product."""
    return F.gelu(gate) * up


def reglu(gate: Tensor, up: Tensor) -> Tensor:
    """ReLU's gated product."""
    return F.relu(gate) * up


class AdaptedMixerBlock(AdaptedBlock, MixerBlock):
    """A block that scans or convolves, with adapted layers."""


class AdaptedAttentionBlock(AdaptedBlock, AttentionBlock):
    """A block that attends, with adapted layers."""


class Kind(enum.Enum):
    """Where the tokens of a block meet."""

    ATTENTION = enum.auto()
    LONG_CONVOLUTION = enum.auto()
    SCAN = enum.auto()


def kind_of(spec: ModelSpec, number: int) -> Kind:
    """Of a block by its number from 0, in any architecture."""
    if spec.architecture is Architecture.TRANSFORMER:
        return Kind.ATTENTION
    own = spec.resonate or ResonateSpec()
    attending, convolving = (min(every, spec.layers) for every in (own.attention_every, own.long_convolution_every))
    if convolving and number % convolving == convolving - 1:
        return Kind.LONG_CONVOLUTION
    if attending and number % attending == attending // 2:
        return Kind.ATTENTION
    return Kind.SCAN
