"""The cost model agrees with the products that a counter sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flops import flops

from pylon_api.training import DataSpec, GatingSpec, ModelSpec, Precision, ScheduleSpec, TrainingSpec
from pylon_trainer.gating import build_step
from pylon_trainer.gating.cost import saved_flops_ratio
from pylon_trainer.models import build_model
from pylon_trainer.step import Batch

VOCABULARY, SEQUENCES, TOKENS = 300, 2, 16  # so short that attention, which is counted without a causal half, is little
MODELS = [({"heads": 2}, 0.25), ({"heads": 4, "kv_heads": 1}, 0.5), ({"heads": 2, "embedding_rank": 16}, 0.25)]
ENGINES = [
    {"engine": "HeadOnly"},
    {"engine": "SinglePass"},
    {"engine": "SinglePass", "kv_gradient": "Dense"},
    {"engine": "SinglePass", "row_activations": "Recompute"},
    {"engine": "SinglePass", "kv_gradient": "Dense", "row_activations": "Recompute"},
    {"engine": "TwoPass"},
    {"engine": "TwoPass", "row_activations": "Recompute"},
    {"engine": "SinglePass", "depth_buckets": 4},
    {"engine": "TwoPass", "depth_buckets": 2, "leak_rate": 0.5},
]


def counted_flops(spec: ModelSpec, gating: GatingSpec) -> int:
    training = TrainingSpec(
        data=DataSpec(train=["unused"]), schedule=ScheduleSpec(steps=1), precision=Precision.FLOAT32, gating=gating
    )
    step = build_step(build_model(spec, vocab_size=VOCABULARY), training, torch.device("cpu"))
    tokens_BT = torch.arange(SEQUENCES * TOKENS).reshape(SEQUENCES, TOKENS) % VOCABULARY
    batch = Batch(tokens_BT, tokens_BT)
    step.forward_backward(batch, global_tokens=tokens_BT.numel(), step=0)
    # The second step: the first of an interval may also look for what a gate would gain.
    return flops(lambda: step.forward_backward(batch, global_tokens=tokens_BT.numel(), step=1))


RESONATE: dict[str, Any] = {
    "architecture": "Resonate",
    "resonate": {"stateSize": 16, "headWidth": 32, "chunkTokens": 8, "longConvolutionEvery": 4, "attentionEvery": 4},
}


ADAPTATION = {"rank": 8, "growEverySteps": 0, "codebook": {"subKeys": 16, "width": 16}}
ADAPTED = [
    RESONATE | {"resonate": RESONATE["resonate"] | {"adaptation": {"base": base} | ADAPTATION}}
    for base in ("Zero", "Seed")
]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("model", "ratio"), [*MODELS, *((model, 0.25) for model in (RESONATE, *ADAPTED))])
def test_saved_flops_are_those_that_are_counted(
    model: dict[str, object], engine: dict[str, object], ratio: float
) -> None:
    spec = ModelSpec.model_validate({"layers": 4, "hidden_size": 128} | model)
    gating = GatingSpec.model_validate({"strategy": "Entropy", "token_ratio": ratio, "ratio_control": "Fixed"} | engine)
    saved = saved_flops_ratio(spec, gating, vocab_size=VOCABULARY, sequence_length=TOKENS, ratio=ratio)
    assert saved == pytest.approx(1 - counted_flops(spec, gating) / counted_flops(spec, GatingSpec()), abs=0.03)


def test_a_head_that_scores_all_rows_and_then_takes_all_costs_more_than_the_plain_one() -> None:
    gating = GatingSpec(strategy="Entropy")
    assert saved_flops_ratio(ModelSpec(), gating, vocab_size=50_000, sequence_length=256, ratio=1) < 0
