"""What a step costs in floating-point operations, gated against plain: a model of the engines, nothing measured.

Products alone count, two operations per multiply-add; norms, rotations and softmax are left out. A backward pass costs
two forward passes. So a plain step costs 3 forward passes, and at ratio r

- a head costs 1 + 3 r: all rows are scored, the chosen ones run again with a backward pass;
- blocks cost 3 with HeadOnly; 1 + 2 r with kept rows, whose attention alone runs again; 1 + 3 r with recomputed rows;
- a dense gradient of keys and values adds a backward pass of their projections over all rows.
"""

from __future__ import annotations

from pylon_api.training import GatingEngine, GatingSpec, KvGradient, ModelSpec, RowActivations
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
    gated = (1 + 3 * ratio) * head
    if gating.engine is GatingEngine.HEAD_ONLY:
        gated += 3 * (linears + attention)
    else:
        recomputes = gating.row_activations is RowActivations.RECOMPUTE
        gated += (1 + (3 if recomputes else 2) * ratio) * linears + (1 + 3 * ratio) * attention
        if gating.kv_gradient is KvGradient.DENSE:
            gated += 2 * model.layers * kv
    return 1 - gated / plain
