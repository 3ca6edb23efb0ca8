"""Replay: recorded steps give what the same steps give when they run kernel by kernel."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from pylon_api.training import Compile, DataSpec, GatingSpec, ModelSpec, Precision, ScheduleSpec, TrainingSpec
from pylon_trainer.gating import build_step
from pylon_trainer.models import build_model
from pylon_trainer.step import IGNORED, Batch, TrainingStep

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "closed loop": {"strategy": "GradientNorm", "engine": "SinglePass", "fallback": "Never", "warmup_steps": 12},
    "two pass": {"strategy": "Entropy", "engine": "TwoPass", "ratio_control": "Fixed", "token_ratio": 0.25},
    "depths": {
        "strategy": "Loss",
        "engine": "SinglePass",
        "ratio_control": "Fixed",
        "depth_buckets": 4,
        "leak_rate": 0.5,
    },
}


def step_of(compile: Compile, gating: dict[str, Any]) -> TrainingStep:
    torch.manual_seed(0)
    spec = ModelSpec(layers=4, hidden_size=64, heads=4, kv_heads=2, initializer_std=0.2)
    model = build_model(spec, vocab_size=509).to("cuda")
    training = TrainingSpec(
        data=DataSpec(train=["unused"]),
        schedule=ScheduleSpec(steps=10),
        precision=Precision.FLOAT32,
        compile=compile,
        gating=GatingSpec.model_validate(gating),
    )
    return build_step(model, training, torch.device("cuda"))


def batch_of(seed: int) -> Batch:
    draws = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(509, (4, 65), generator=draws)
    labels_BT = tokens_BT[:, 1:].clone()
    labels_BT[:, : seed % 5] = IGNORED  # so that the number of labels changes from step to step
    return Batch(tokens_BT[:, :-1].contiguous(), labels_BT).to(torch.device("cuda"))


def pass_over(step: TrainingStep, number: int, micro_batches: int) -> Tensor:
    """Losses and norms of the gradients of one step, which leaves its gradients behind."""
    batches = [batch_of(number * micro_batches + part) for part in range(micro_batches)]
    tokens = sum(int((batch.labels_BT != IGNORED).sum()) for batch in batches)
    losses = [step.forward_backward(batch, global_tokens=tokens, step=number).loss_sum for batch in batches]
    return torch.stack([parameter.grad.norm() for parameter in step.model.parameters()] + losses)


@pytest.mark.gpu
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_replayed_steps_are_like_others(kind: str, micro_batches: int) -> None:
    replayed, other = (step_of(compile, KINDS[kind]) for compile in (Compile.GRAPH, Compile.DEFAULT))
    for number in range(24):
        seen, expected = (pass_over(step, number, micro_batches) for step in (replayed, other))
        torch.testing.assert_close(seen, expected, rtol=2e-3, atol=1e-5)
        # The weights move, so that scores and ratios do, and alike: one token more or less in a draw would part the two
        # for good.
        with torch.no_grad():
            for mine, its in zip(replayed.model.parameters(), other.model.parameters(), strict=True):
                its -= 1e-3 * its.grad
                mine.copy_(its)
                mine.grad = its.grad = None


@pytest.mark.gpu
def test_a_replayed_step_never_waits_and_launches_one_graph(waiting_is_an_error: AbstractContextManager[None]) -> None:
    step, batch = step_of(Compile.GRAPH, KINDS["two pass"]), batch_of(5)
    for number in range(1, 4):
        step.forward_backward(batch, global_tokens=256, step=number)
        step.model.zero_grad()
    torch.cuda.synchronize()
    with waiting_is_an_error, torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step.forward_backward(batch, global_tokens=256, step=4)
    products = [event for event in profile.events() if event.name in ("aten::mm", "aten::addmm")]
    assert not products  # all of them are in the graph
