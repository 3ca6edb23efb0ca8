"""The Transformer: a pre-norm decoder that computes what Llama computes, at any size.

It exists so that the blocks can be compiled one by one and so that the head can run on chosen rows only: `forward` ends
at the hidden states, `head` turns rows of them into logits. It knows nothing of losses, gates, devices or precision.

Shapes: B sequences, T tokens, D hidden width, H query heads, J key and value heads, E width of a head, F inner width
of the MLP, V vocabulary, R rank of factorised embeddings; a tensor's name ends in its shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pylon_api.training import ModelSpec
from pylon_trainer.errors import ConfigError
from pylon_trainer.models.context import Context


def build_model(spec: ModelSpec, *, vocab_size: int) -> Transformer:
    """The network, initialised from torch's global random state, on the default device, in float32.

    vocab_size: ids that the tokenizer needs. spec.vocab_size may be larger (rows are then spare), never smaller:
    raises ConfigError.
    """
    if spec.vocab_size is not None and spec.vocab_size < vocab_size:
        raise ConfigError(
            f"training.model.vocabSize: {spec.vocab_size} is too small, the tokenizer has {vocab_size} tokens; "
            f"set at least {vocab_size} or leave it out"
        )
    if spec.embedding_rank >= spec.hidden_size:
        raise ConfigError(
            f"training.model.embeddingRank: {spec.embedding_rank} saves nothing at hiddenSize {spec.hidden_size}; "
            "set a smaller rank, or 0 for plain embeddings"
        )
    return Transformer(spec, spec.vocab_size or vocab_size)


class Transformer(nn.Module):
    """Decoder of `spec.layers` blocks over `vocab_size` tokens."""

    def __init__(self, spec: ModelSpec, vocab_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.vocab_size = vocab_size
        width = spec.embedding_rank or spec.hidden_size
        self.embedding = nn.Embedding(vocab_size, width)
        self.embedding_projection = _linear(width, spec.hidden_size) if spec.embedding_rank else None
        # A ModuleList does not say what is in it.
        self.blocks = cast("Sequence[Block]", nn.ModuleList(Block(spec) for _ in range(spec.layers)))
        self.norm = nn.RMSNorm(spec.hidden_size, eps=spec.norm_epsilon)
        tied = spec.tie_embeddings
        self.output_projection = None if tied or not spec.embedding_rank else _linear(spec.hidden_size, width)
        self.output = None if tied else _linear(width, vocab_size)
        self._initialise()

    def forward(self, tokens_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """Hidden states B x T x D after the last norm.

        documents_BT: number of the document of each token, rising along a sequence; given, a token sees only its own
        document and positions start again with each.
        """
        context = self.context(tokens_BT, documents_BT)
        x_BTD = self.embed(tokens_BT, context.places)
        for block in self.blocks:
            x_BTD = block(x_BTD, context)
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

    def context(self, tokens_BT: Tensor, documents_BT: Tensor | None = None) -> Context:
        """What every block needs to know of these sequences; arguments as forward has them."""
        device = tokens_BT.device
        width = self.spec.hidden_size // self.spec.heads
        pairs = torch.arange(0, width, 2, device=device, dtype=torch.float32)
        frequencies = self.spec.rope_theta ** (-pairs / width)
        places_T = torch.arange(tokens_BT.shape[1], device=device)
        if documents_BT is None:
            angles = places_T[:, None] * frequencies
            return Context.of(places_T, angles.cos(), angles.sin())
        starts_BT = torch.searchsorted(documents_BT, documents_BT)  # the first place of each token's own document
        places_BT = places_T - starts_BT
        angles_BTE = places_BT[..., None] * frequencies
        return Context.of(places_BT, angles_BTE.cos().unsqueeze(1), angles_BTE.sin().unsqueeze(1), starts_BT)

    def _initialise(self) -> None:
        """Normal matrices; those that write to the residual stream shrink with depth (GPT-2, section 2.3), and a
        factorised embedding's product has the deviation that a plain one would have."""
        std = self.spec.initializer_std
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
        for module in self.modules():
            if isinstance(module, Block):
                for residual in (module.attention.output, module.mlp.down):
                    nn.init.normal_(residual.weight, std=std / math.sqrt(2 * self.spec.layers))
        for projection in (self.embedding_projection, self.output_projection):
            if projection is not None:
                nn.init.normal_(projection.weight, std=1 / math.sqrt(self.spec.embedding_rank))


class Block(nn.Module):
    """Attention, then the MLP, each on a normed copy and added to the residual stream."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(spec.hidden_size, eps=spec.norm_epsilon)
        self.attention = Attention(spec)
        self.mlp_norm = nn.RMSNorm(spec.hidden_size, eps=spec.norm_epsilon)
        self.mlp = SwiGLU(spec.hidden_size, intermediate_size(spec))

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), context)
        updated_BTD: Tensor = x_BTD + self.mlp(self.mlp_norm(x_BTD), context)
        return updated_BTD

    def keys_values(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """What tokens offer to those that attend to them, each B x J x T x E."""
        return self.attention.keys_values(self.attention_norm(x_BTD), context)


class Attention(nn.Module):
    """Causal attention in which groups of H / J query heads share a key and a value head."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.width = spec.hidden_size // spec.heads
        kv_width = (spec.kv_heads or spec.heads) * self.width
        self.query = _linear(spec.hidden_size, spec.hidden_size)
        self.key = _linear(spec.hidden_size, kv_width)
        self.value = _linear(spec.hidden_size, kv_width)
        self.output = _linear(spec.hidden_size, spec.hidden_size)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        k_BJTE, v_BJTE = self.keys_values(x_BTD, context)
        q_BHTE = rotate(self._heads(context.linear(self.query, x_BTD)), context)
        y_BHTE = context.attend(q_BHTE, k_BJTE, v_BJTE)
        return context.linear(self.output, y_BHTE.transpose(1, 2).flatten(2))

    def keys_values(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """What tokens offer to those that attend to them, each B x J x T x E."""
        k_BJTE = rotate(self._heads(context.linear(self.key, x_BTD)), context)
        return k_BJTE, self._heads(context.linear(self.value, x_BTD))

    def _heads(self, x: Tensor) -> Tensor:
        """B x T x (heads E) to B x heads x T x E."""
        return x.view(*x.shape[:-1], x.shape[-1] // self.width, self.width).transpose(1, 2)


class SwiGLU(nn.Module):
    """silu(gate x) * (up x), then down (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate = _linear(hidden_size, intermediate_size)
        self.up = _linear(hidden_size, intermediate_size)
        self.down = _linear(intermediate_size, hidden_size)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        gated_BTF = F.silu(context.linear(self.gate, x_BTD)) * context.linear(self.up, x_BTD)
        return context.linear(self.down, gated_BTF)


def intermediate_size(spec: ModelSpec) -> int:
    """Inner width of the MLP: as given, or 8/3 of the hidden size rounded up to a multiple of 64."""
    return spec.intermediate_size or 64 * math.ceil(spec.hidden_size * 8 / 3 / 64)


def rotate(x_BHTE: Tensor, context: Context) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864): pair i is (i, i + E/2), as Llama's weights expect."""
    cos, sin = context.cos.to(x_BHTE.dtype), context.sin.to(x_BHTE.dtype)
    first, second = x_BHTE.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)
