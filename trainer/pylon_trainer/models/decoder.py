"""Decoder: what all architectures share, so that steps, gates, samples and exports need not know which one they have.

Embedding, rotary positions, last norm and head are here; a subclass says what its blocks are. Blocks can be compiled
one by one, and the head can run on chosen rows only: `forward` ends at the hidden states, `head` turns rows of them
into logits. It knows nothing of losses, gates, devices or precision.

Shapes: B sequences, T tokens, D hidden width, E width of an attention head, V vocabulary, R rank of factorised
embeddings.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pylon_api.training import ModelSpec
from pylon_trainer.models.context import Context
from pylon_trainer.models.recompute import recomputed


class Block(nn.Module, ABC):
    """One layer of the residual stream."""

    @abstractmethod
    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """B x T x D to the same."""

    @abstractmethod
    def offers(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, ...]:
        """What the tokens offer to later ones: what the block hands to `attend` beside the queries, or to `mix`."""

    @abstractmethod
    def residual_outputs(self) -> tuple[nn.Linear, ...]:
        """Its layers that write to the residual stream."""

    @abstractmethod
    def open_ports(self, advice_size: int) -> None:
        """Give it the ports by which advice of this size enters it (models/ports.py). Without, it takes none."""


class Decoder(nn.Module, ABC):
    """`spec.layers` blocks over `vocab_size` tokens."""

    generated: str | None = None
    """Digest of weights that come from a seed at every start and are in no checkpoint; None: there are none."""

    def __init__(self, spec: ModelSpec, vocab_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.vocab_size = vocab_size
        width = spec.embedding_rank or spec.hidden_size
        self.embedding = nn.Embedding(vocab_size, width)
        self.embedding_projection = plain_linear(width, spec.hidden_size) if spec.embedding_rank else None
        # A ModuleList does not say what is in it.
        self.blocks = cast("Sequence[Block]", nn.ModuleList(self._block(number) for number in range(spec.layers)))
        self.norm = nn.RMSNorm(spec.hidden_size, eps=spec.norm_epsilon)
        tied = spec.tie_embeddings
        self.output_projection = None if tied or not spec.embedding_rank else plain_linear(spec.hidden_size, width)
        self.output = None if tied else plain_linear(width, vocab_size)
        self.recomputes_blocks = False
        """Whether `forward` holds nothing of a block but its input for the way back."""
        self._initialise()

    @property
    def attends(self) -> bool:
        """Whether any block attends."""
        return True

    @abstractmethod
    def _block(self, number: int) -> Block:
        """The block of this number, from 0."""

    def forward(self, tokens_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """Hidden states B x T x D after the last norm.

        documents_BT: number of the document of each token, rising along a sequence; given, a token sees only its own
        document and positions start again with each.
        """
        context = self.context(tokens_BT, documents_BT)
        x_BTD = self.embed(tokens_BT, context.places)
        for block in self.blocks:
            x_BTD = self._recomputed(block, x_BTD, context) if self.recomputes_blocks else block(x_BTD, context)
        normed_BTD: Tensor = self.norm(x_BTD)
        return normed_BTD

    def embed(self, tokens: Tensor, places: Tensor) -> Tensor:  # noqa: ARG002  attention alone knows of places here
        """What enters the first block: ... x D of ids of any shape, at places of their documents."""
        x: Tensor = self.embedding(tokens)
        if self.embedding_projection is not None:
            # The residual stream keeps the weights' precision, under autocast too.
            x = self.embedding_projection(x).to(x.dtype)
        return x

    def head(self, hidden: Tensor) -> Tensor:
        """Logits ... x V of hidden states ... x D."""
        if self.output_projection is not None:
            hidden = self.output_projection(hidden)
        elif self.embedding_projection is not None and self.output is None:
            hidden = F.linear(hidden, self.embedding_projection.weight.T)
        return F.linear(hidden, self.embedding.weight if self.output is None else self.output.weight)

    @property
    def embedding_weight(self) -> Tensor:
        """V x D: the embedding, multiplied out if it is factorised."""
        if self.embedding_projection is None:
            return self.embedding.weight
        return self.embedding.weight @ self.embedding_projection.weight.T

    @property
    def head_weight(self) -> Tensor:
        """V x D: head(hidden) == hidden @ head_weight.T, multiplied out if it is factorised."""
        if self.output is None:
            return self.embedding_weight
        if self.output_projection is None:
            return self.output.weight
        return self.output.weight @ self.output_projection.weight

    def context(self, tokens_BT: Tensor, documents_BT: Tensor | None = None, *, first: int = 0) -> Context:
        """What every block needs to know of these sequences; arguments as forward has them. first: place of the first
        token, when earlier ones are remembered."""
        device = tokens_BT.device
        width = self.spec.hidden_size // self.spec.heads
        pairs = torch.arange(0, width, 2, device=device, dtype=torch.float32)
        frequencies = self.spec.rope_theta ** (-pairs / width)
        places_T = torch.arange(first, first + tokens_BT.shape[1], device=device)
        if documents_BT is None:
            angles = places_T[:, None] * frequencies
            return Context.of(places_T, angles.cos(), angles.sin())
        starts_BT = torch.searchsorted(documents_BT, documents_BT)  # the first place of each token's own document
        places_BT = places_T - starts_BT
        angles_BTE = places_BT[..., None] * frequencies
        return Context.of(
            places_BT, angles_BTE.cos().unsqueeze(1), angles_BTE.sin().unsqueeze(1), starts_BT, attends=self.attends
        )

    def _recomputed(self, block: Block, x_BTD: Tensor, context: Context) -> Tensor:
        device = x_BTD.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

        def run(x_BTD: Tensor, advice_PR: Tensor | None = None) -> Tensor:
            y_BTD: Tensor = block(x_BTD, replace(context, holds_mixers=True, advice_PR=advice_PR))
            return y_BTD

        inputs = (x_BTD,) if context.advice_PR is None else (x_BTD, context.advice_PR)
        return recomputed(run, block, *inputs, autocast=autocast)

    def initial_std(self, *, is_residual: bool) -> float:
        """Deviation that a matrix is drawn with; those that write to the residual stream shrink with depth (GPT-2,
        section 2.3)."""
        return self.spec.initializer_std / math.sqrt(2 * self.spec.layers if is_residual else 1)

    def _initialise(self) -> None:
        """Normal matrices; a factorised embedding's product has the deviation that a plain one would have."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.initial_std(is_residual=False))
        for block in self.blocks:
            for residual in block.residual_outputs():
                nn.init.normal_(residual.weight, std=self.initial_std(is_residual=True))
        for projection in (self.embedding_projection, self.output_projection):
            if projection is not None:
                nn.init.normal_(projection.weight, std=1 / math.sqrt(self.spec.embedding_rank))


def norm_limit_of(spec: ModelSpec) -> float | None:
    """On what a block's layers add to a token; None for none."""
    stability = None if spec.resonate is None else spec.resonate.stability
    return None if stability is None else stability.branch_norm_limit


def add_branch(x_BTD: Tensor, branch_BTD: Tensor, norm_limit: float | None) -> Tensor:
    """The residual stream with what a layer adds to it: to each token at most so many times its own norm."""
    if norm_limit is None:
        return x_BTD + branch_BTD
    own_BT1, norm_BT1 = (torch.linalg.vector_norm(y.float(), dim=-1, keepdim=True) for y in (x_BTD, branch_BTD))
    # The square of the least norm is not 0, or gradients of a branch that adds nothing would not be numbers.
    limited_BTD: Tensor = branch_BTD * (norm_limit * own_BT1 / norm_BT1.clamp_min(1e-12)).clamp_max(1)
    return x_BTD + limited_BTD


def plain_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer without bias, as all of a decoder's are."""
    return nn.Linear(inputs, outputs, bias=False)
