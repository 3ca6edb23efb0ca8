"""What a step costs in floating-point operations, gated against plain: a model of the engines, nothing measured.

Products alone count, two operations per multiply-add; norms, rotations and softmax are left out. A backward pass costs
two forward passes. So a plain step costs 3 forward passes, and at ratio r a head costs 1 + 3r: all rows are scored, the
chosen ones run again with a backward pass. Blocks cost 3 with HeadOnly, and what engine.py states with the others,
where depth tiers let fewer rows reach the lower blocks and a dense gradient of keys and values adds a backward pass of
their projections over all rows, after a second forward pass where nothing was kept. With Sequence granularity a share
of the sequences costs all, after a router has run a few blocks and the head forward over each.

Weights that do not learn (the base of adapted layers) cost no gradient of theirs: two forward passes, not three.

A mixer (models/context.py) runs over all tokens whatever the rows, and again on the way back.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from pylon_api.training import (
    AdaptationBase,
    GatingEngine,
    GatingGranularity,
    GatingSpec,
    KvGradient,
    ModelSpec,
    ResonateSpec,
    RowActivations,
)
from pylon_trainer.gating.depth import blocks_over
from pylon_trainer.gating.router import router_layers
from pylon_trainer.models.resonate.hyper import SUMMARY_TOKENS
from pylon_trainer.models.resonate.model import Kind, kind_of
from pylon_trainer.models.resonate.scan import SPAN_CHUNKS
from pylon_trainer.models.transformer import intermediate_size


def saved_flops_ratio(
    model: ModelSpec, gating: GatingSpec, *, vocab_size: int, sequence_length: int, ratio: float
) -> float:
    """Share of a plain step's operations that a gated step at `ratio` spares; negative when it costs more."""
    width = model.hidden_size
    costs = [_block(model, number, sequence_length) for number in range(model.layers)]
    linears, learnt, offers, learnt_offers, attention, mixing = map(float, map(sum, zip(*costs, strict=True)))
    rank = model.embedding_rank
    head = 2 * (vocab_size * (rank or width) + rank * width)

    plain = 2 * linears + learnt + 3 * (attention + head) + 4 * mixing
    if gating.granularity is GatingGranularity.SEQUENCE:
        lowest = costs[: router_layers(gating, model.layers)]
        router = sum(cost.linears + cost.attention + cost.mixing for cost in lowest) + head
        return 1 - ratio - router / plain
    gated = (1 + 3 * ratio) * head
    if gating.engine is GatingEngine.HEAD_ONLY:
        gated += 2 * linears + learnt + 3 * attention + 4 * mixing
    else:
        reached = ratio * _reach(model.layers, gating)
        again = (gating.engine is GatingEngine.TWO_PASS) + (gating.row_activations is RowActivations.RECOMPUTE)
        # Kept linear outputs spare a second run of the linear layers alone, so attention runs twice at least.
        gated += (1 + (1 + again) * reached) * linears + reached * learnt
        gated += (1 + (2 + max(again, 1)) * reached) * attention
        is_third_pass = gating.engine is GatingEngine.TWO_PASS and gating.row_activations is RowActivations.RECOMPUTE
        gated += (5 + is_third_pass) * mixing
        if gating.kv_gradient is KvGradient.DENSE:
            gated += (1 + (gating.row_activations is RowActivations.RECOMPUTE)) * offers + learnt_offers
    return 1 - gated / plain


class _Block(NamedTuple):
    """Operations of a block's forward pass, per token."""

    linears: float
    learnt: float
    """Of the linear layers, those by weights that learn, whose gradients cost as much again."""
    offers: float
    """Of the linear layers, those whose outputs tokens offer to later ones."""
    learnt_offers: float
    attention: float
    mixing: float


def _block(model: ModelSpec, number: int, sequence_length: int) -> _Block:
    width = model.hidden_size
    own = model.resonate or ResonateSpec()
    length = min(own.chunk_tokens, sequence_length)
    chunks = min(math.ceil(sequence_length / length), SPAN_CHUNKS) + 1

    def recurrence(channels: int, state: int) -> float:
        """Within a chunk; what it adds to the state and reads of it; the states of the chunks before."""
        return 2 * channels * (length + 2 * state + chunks * state / length)

    kind, attention, mixing = kind_of(model, number), 0.0, 0.0
    if kind is Kind.ATTENTION:
        attention = 2 * width * sequence_length  # a token sees half the sequence
        kv_width = (model.kv_heads or model.heads) * (width // model.heads)
        offering, others = [(width, kv_width)] * 2, [(width, width)] * 2
    else:
        inner = own.expand * width
        mixing, projected = recurrence(inner, own.state_size), 2 * inner
        if kind is Kind.SCAN:
            projected += 2 * own.groups * own.state_size + inner // own.head_width
            mixing += 2 * length * own.groups * own.state_size  # scores
        offering, others = [(width, projected)], [(inner, width)]
    others += [(width, intermediate_size(model))] * 3
    (offers, learnt_offers), (rest, learnt_rest) = (_products(model, layers) for layers in (offering, others))
    hyper = 0
    if own.adaptation is not None and (codebook := own.adaptation.codebook) is not None:
        scales = (len(offering) + len(others)) * own.adaptation.allocated_rank
        hyper = 2 * codebook.width * (width + 3 * codebook.width + 2 * codebook.sub_keys + scales)
        mixing += recurrence(codebook.width, len(SUMMARY_TOKENS))
    offers, learnt_offers = offers + hyper, learnt_offers + hyper
    return _Block(offers + rest, learnt_offers + learnt_rest, offers, learnt_offers, attention, mixing)


def _products(model: ModelSpec, layers: list[tuple[int, int]]) -> tuple[int, int]:
    """Operations of linear layers, by inputs and outputs, and those of them by weights that learn."""
    adaptation = model.adaptation
    total = learnt = 0
    for inputs, outputs in layers:
        plain = 2 * inputs * outputs
        if adaptation is None or min(inputs, outputs) <= adaptation.allocated_rank:
            low, base = plain, 0
        else:
            low = 2 * adaptation.allocated_rank * (inputs + outputs)
            base = 0 if adaptation.base is AdaptationBase.ZERO else plain
        total, learnt = total + low + base, learnt + low
    return total, learnt


def _reach(layers: int, gating: GatingSpec) -> float:
    """Share of the blocks that a chosen row's gradient goes back over, on average, once all depth tiers are open."""
    depths = [blocks_over(layers, gating.depth_buckets, bucket) for bucket in range(gating.depth_buckets)]
    share = sum(depths) / (layers * len(depths))
    return share + gating.leak_rate * (1 - share)
