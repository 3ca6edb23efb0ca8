"""What a step costs in floating-point operations, gated against plain: a model of the engines, nothing measured.

Products alone count, two operations per multiply-add; norms, rotations and softmax are left out. A backward pass costs
two forward passes. So a plain step costs 3 forward passes, and at ratio r a head costs 1 + 3r: all rows are scored, the
chosen ones run again with a backward pass. Blocks cost 3 with HeadOnly, and what engine.py states with the others,
where depth tiers let fewer rows reach the lower blocks and a dense gradient of keys and values adds a backward pass of
their projections over all rows, after a second forward pass where nothing was kept. With Sequence granularity a share
of the sequences costs all, after a router has run a few blocks and the head forward over each.
"""

from __future__ import annotations

from pylon_api.training import GatingEngine, GatingGranularity, GatingSpec, KvGradient, ModelSpec, RowActivations
from pylon_trainer.gating.depth import blocks_over
from pylon_trainer.gating.router import router_layers
from pylon_trainer.models.transformer import intermediate_size


def saved_flops_ratio(
    model: ModelSpec, gating: GatingSpec, *, vocab_size: int, sequence_length: int, ratio: float
) -> float:
    """Share of a plain step's operations that a gated step at `ratio` spares; negative when it costs more."""
    width = model.hidden_size
    kv = 4 * width * (model.kv_heads or model.heads) * (width // model.heads)
    linears = model.layers * (4 * width**2 + kv + 6 * width * intermediate_size(model))
    attention = model.layers * 2 * width * sequence_length  # a token sees half the sequence
    rank = model.embedding_rank
    head = 2 * (vocab_size * (rank or width) + rank * width)

    plain = 3 * (linears + attention + head)
    if gating.granularity is GatingGranularity.SEQUENCE:
        router = router_layers(gating, model.layers) / model.layers * (linears + attention) + head
        return 1 - ratio - router / plain
    gated = (1 + 3 * ratio) * head
    if gating.engine is GatingEngine.HEAD_ONLY:
        gated += 3 * (linears + attention)
    else:
        reached = ratio * _reach(model.layers, gating)
        again = (gating.engine is GatingEngine.TWO_PASS) + (gating.row_activations is RowActivations.RECOMPUTE)
        # Kept linear outputs spare a second run of the linear layers alone, so attention runs twice at least.
        gated += (1 + (2 + again) * reached) * linears + (1 + (2 + max(again, 1)) * reached) * attention
        if gating.kv_gradient is KvGradient.DENSE:
            gated += (2 + (gating.row_activations is RowActivations.RECOMPUTE)) * model.layers * kv
    return 1 - gated / plain


def _reach(layers: int, gating: GatingSpec) -> float:
    """Share of the blocks that a chosen row's gradient goes back over, on average, once all depth tiers are open."""
    depths = [blocks_over(layers, gating.depth_buckets, bucket) for bucket in range(gating.depth_buckets)]
    share = sum(depths) / (layers * len(depths))
    return share + gating.leak_rate * (1 - share)
