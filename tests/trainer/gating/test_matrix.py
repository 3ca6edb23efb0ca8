"""A gated loss through every engine, in every way that a job may run it, against one dense and masked backward pass.

{float32, bfloat16} x {eager, compiled} x {1, 2 ranks} x {1, 4 micro-batches} x {rows kept, recomputed} x {packed
documents on, off} x engines. What is compiled, is so without a graph break (test_compile.py has each engine); here it
stops before code is generated, which is torch's business, and slow.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from engines import (
    ENGINES,
    assert_same,
    autocast,
    batch_of,
    cut_hidden,
    engine_of,
    gradients,
    kv_gradient_of,
    model_of,
)
from ranks import run_ranks
from torch import Tensor

from pylon_trainer.consensus.exact import ExactExchange
from pylon_trainer.gating.engine import Engine
from pylon_trainer.gating.gradients import accumulate
from pylon_trainer.models import Transformer
from pylon_trainer.runtime.distributed import World
from pylon_trainer.step import Batch

SEQUENCES, LENGTH = 8, 9
TOKENS = SEQUENCES * LENGTH
SETTINGS = [*itertools.product([False, True], [False, True])]
SETTING_NAMES = [f"{'bfloat16' if b else 'float32'}-{'packed' if p else 'whole'}" for b, p in SETTINGS]


def weights_of() -> Tensor:
    """Of each token's loss, B x T; 0 for those that are not chosen, about half."""
    weights_BT = torch.rand(SEQUENCES, LENGTH, generator=torch.Generator().manual_seed(4)) + 0.5
    return torch.where(weights_BT > 1, weights_BT, 0.0)


def gated(
    engine: Engine, model: Transformer, batch: Batch, weights_BT: Tensor, micro_batches: int, bfloat16: bool
) -> None:
    """What a step does once the rows are chosen; adds to the gradients."""
    size = len(batch.tokens_BT) // micro_batches
    for part, weights in zip(batch.split(size), weights_BT.split(size), strict=True):
        hidden_ND, back = engine.forward(part)
        (rows_K,) = weights.flatten().nonzero(as_tuple=True)
        leaf_KD = hidden_ND[rows_K].requires_grad_()
        loss_of(model, leaf_KD, part.labels_BT.flatten()[rows_K], weights.flatten()[rows_K], bfloat16).backward()
        assert leaf_KD.grad is not None
        back(rows_K, leaf_KD.grad, accumulate)


def loss_of(model: Transformer, hidden_KD: Tensor, labels_K: Tensor, weights_K: Tensor, bfloat16: bool) -> Tensor:
    with autocast(bfloat16):
        logits_KV = model.head(hidden_KD).float()
    return (F.cross_entropy(logits_KV, labels_K, reduction="none") * weights_K).sum() / TOKENS


def dense(name: str, bfloat16: bool, isolated: bool) -> dict[str, Tensor]:
    """The whole batch at once, every token's loss times its weight."""
    model, batch, weights_N = model_of(), batch_of(SEQUENCES, LENGTH, isolated), weights_of().flatten()
    hidden_ND = cut_hidden(model, batch, weights_N.nonzero().flatten().tolist(), kv_gradient_of(name), bfloat16)
    loss_of(model, hidden_ND, batch.labels_BT.flatten(), weights_N, bfloat16).backward()
    return gradients(model)


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize(("bfloat16", "isolated"), SETTINGS, ids=SETTING_NAMES)
@pytest.mark.parametrize("name", ENGINES)
def test_eager(name: str, bfloat16: bool, isolated: bool, micro_batches: int) -> None:
    model, batch = model_of(), batch_of(SEQUENCES, LENGTH, isolated)
    gated(engine_of(name, model, bfloat16=bfloat16), model, batch, weights_of(), micro_batches, bfloat16)
    assert_same(gradients(model), dense(name, bfloat16, isolated), 3e-2 if bfloat16 else 1e-5)


RANK_CASES = {
    "eager": [(name, *setting, micro_batches) for name in ENGINES for setting in SETTINGS for micro_batches in (1, 4)],
    "compiled": [("SinglePass-Truncated-Keep", True, True, 4), ("TwoPass-Truncated-Recompute", False, False, 4)],
}
"""Engine, bfloat16, packed documents, micro-batches."""


@pytest.mark.slow
@pytest.mark.parametrize("mode", RANK_CASES)
def test_two_ranks(mode: str, tmp_path: Path) -> None:
    """Each holds half of the sequences, and the sum of their gradients is that of the batch."""
    expected = {case[:3]: dense(*case[:3]) for case in RANK_CASES[mode]}
    backend = "aot_eager" if mode == "compiled" else None

    def gradients_of_half(
        rank: int, name: str, bfloat16: bool, isolated: bool, micro_batches: int
    ) -> dict[str, Tensor]:
        half = slice(rank * SEQUENCES // 2, (rank + 1) * SEQUENCES // 2)
        model, batch = model_of(), batch_of(SEQUENCES, LENGTH, isolated)
        documents_BT = None if batch.documents_BT is None else batch.documents_BT[half]
        own = Batch(batch.tokens_BT[half], batch.labels_BT[half], documents_BT)
        engine = engine_of(name, model, bfloat16=bfloat16, backend=backend)
        gated(engine, model, own, weights_of()[half], micro_batches, bfloat16)
        return gradients(model)

    def take_part(world: World) -> None:
        for case in RANK_CASES[mode]:
            summed = gradients_of_half(world.rank, *case)
            ExactExchange(world, 2**20).exchange(summed)
            assert_same(summed, expected[case[:3]], 3e-2 if case[1] else 1e-5)

    if backend:
        for case in RANK_CASES[mode]:
            gradients_of_half(0, *case)  # compiled here, once, and inherited by the ranks
    run_ranks(take_part, tmp_path, 2)
