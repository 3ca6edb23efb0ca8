"""Whole sequences are left out before they run; the gradient stays what their weights say."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from flops import flops
from torch import Tensor

from pylon_api.training import BatchSpec, DataSpec, GatingSpec, ModelSpec, Precision, ScheduleSpec, TrainingSpec
from pylon_trainer.errors import ConfigError
from pylon_trainer.gating import build_step
from pylon_trainer.gating.cost import saved_flops_ratio
from pylon_trainer.gating.sequence import SequenceStep
from pylon_trainer.models import Transformer, build_model
from pylon_trainer.step import IGNORED, Batch, StepResult, TrainingStep

VOCABULARY = 61
SPEC = ModelSpec(layers=4, hidden_size=32, heads=2, intermediate_size=48, initializer_std=0.2)


def model_of() -> Transformer:
    torch.manual_seed(0)
    return build_model(SPEC, vocab_size=VOCABULARY)


def step_of(model: Transformer, batch: BatchSpec = BatchSpec(), **gating: object) -> TrainingStep:  # noqa: B008
    training = TrainingSpec(
        model=SPEC,
        batch=batch,
        data=DataSpec(train=["unused"]),
        schedule=ScheduleSpec(steps=10),
        precision=Precision.FLOAT32,
        gating=GatingSpec.model_validate(gating),
    )
    return build_step(model, training, model.embedding.weight.device)


def gated(model: Transformer, ratio: float, **gating: object) -> TrainingStep:
    fixed = {"strategy": "GradientNorm", "granularity": "Sequence", "ratio_control": "Fixed", "token_ratio": ratio}
    return step_of(model, **{**fixed, **gating})


def batch_of(sequences: int, ignored: int = 0) -> Batch:
    draws = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(0, VOCABULARY, (sequences, 12), generator=draws)
    labels_BT = torch.randint(0, VOCABULARY, (sequences, 12), generator=draws)
    labels_BT[:ignored] = IGNORED
    return Batch(tokens_BT, labels_BT, (torch.arange(12) // 5).int().expand(sequences, -1).contiguous())


def run(step: TrainingStep, batch: Batch, number: int = 5) -> tuple[StepResult, Tensor]:
    """The result, and all gradients in one row."""
    step.model.zero_grad()
    tokens = int((batch.labels_BT != IGNORED).sum())
    result = step.forward_backward(batch, global_tokens=tokens, step=number)
    return result, torch.cat([p.grad.flatten() for p in step.model.parameters() if p.grad is not None])


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("selection", ["Sampled", "Top"])
def test_gradient_is_that_of_the_chosen_sequences_by_their_weights(
    selection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = model_of(), batch_of(6, ignored=1)
    step = gated(model, 0.5, selection=selection)
    assert isinstance(step, SequenceStep)
    seen = []
    choose = step._gate.choose
    monkeypatch.setattr(step._gate, "choose", lambda *arguments: seen.append(choose(*arguments)) or seen[-1])
    result, gradient = run(step, batch)

    rows_K, weights_K = seen[0]
    assert len(rows_K) == 3
    expected = torch.zeros_like(gradient)
    for row, weight in zip(rows_K.tolist(), weights_K.tolist(), strict=True):
        expected += weight * run(step_of(model), batch.take(torch.tensor([row])))[1] * 12 / 60
    assert distance(gradient, expected) < 1e-5
    assert (int(result.tokens), int(result.gated_tokens)) == (60, 36)


def test_sampled_gradients_and_losses_are_unbiased() -> None:
    """The mean over many steps' draws approaches the plain gradient; that of the highest scores stays away."""
    model, batch = model_of(), batch_of(8)
    plain_result, plain = run(step_of(model), batch)

    def mean_of(selection: str, draws: int) -> tuple[float, float]:
        step = gated(model, 0.25, selection=selection)
        runs = [run(step, batch, number) for number in range(draws)]
        mean = torch.stack([gradient for _, gradient in runs]).mean(0)
        return distance(mean, plain), sum(float(result.loss_sum) for result, _ in runs) / draws

    bias, loss_sum = mean_of("Sampled", 150)
    assert bias < 0.15
    assert loss_sum == pytest.approx(float(plain_result.loss_sum), rel=0.02)
    assert mean_of("Top", 1)[0] > 0.3


@pytest.mark.parametrize(
    ("ratio", "batch", "number"),
    [(0.95, batch_of(5), 5), (0.25, batch_of(1), 5), (1, batch_of(5), 8), (1, batch_of(5), 5)],
    ids=["all chosen", "a batch of one", "a plain step that is looked at", "a plain step"],
)
def test_all_sequences_equal_the_plain_step(ratio: float, batch: Batch, number: int) -> None:
    model = model_of()
    plain_result, plain = run(step_of(model), batch)
    result, gradient = run(gated(model, ratio), batch, number)
    assert distance(gradient, plain) < 1e-5
    assert float(result.loss_sum) == pytest.approx(float(plain_result.loss_sum), rel=1e-5)
    assert int(result.gated_tokens) == int(result.tokens)


@pytest.mark.parametrize("selection", ["Sampled", "Top"])
def test_a_batch_without_labels_gives_zero_and_no_nan(selection: str) -> None:
    result, gradient = run(gated(model_of(), 0.5, selection=selection), batch_of(4, ignored=4))
    assert float(result.loss_sum) == int(result.tokens) == int(result.gated_tokens) == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize(
    ("micro_sequences", "gating", "field"),
    [
        (1, {"ratio_control": "Fixed", "token_ratio": 0.5}, "tokenRatio 0.5"),
        (4, {"ratio_control": "Fixed", "token_ratio": 0.8}, "tokenRatio 0.8"),
        (4, {"ratio_control": "GradientMass", "minimum_token_ratio": 0.8}, "minimumTokenRatio 0.8"),
    ],
)
def test_a_micro_batch_of_which_no_sequence_could_be_left_out_is_refused(
    micro_sequences: int, gating: dict[str, object], field: str
) -> None:
    batch = BatchSpec(sequences=8, micro_sequences=micro_sequences)
    with pytest.raises(ConfigError, match=f"gating.{field} leaves out none of the {micro_sequences} .*microSequences"):
        step_of(model_of(), batch, **{"strategy": "GradientNorm", "granularity": "Sequence", **gating})


def test_saved_flops_go_by_the_sequences_that_run() -> None:
    """A ratio of 0.3 takes one half of two sequences."""
    reports = []
    for ratio in (0.3, 0.5):
        step = gated(model_of(), ratio, batch=BatchSpec(sequences=2))
        run(step, batch_of(2))
        reports.append(step.report())
    assert reports[0] is not None
    assert reports[1] is not None
    assert reports[0].saved_flops_ratio == reports[1].saved_flops_ratio > 0


@pytest.mark.parametrize("ratio", [1, 0.5], ids=["plain", "gated"])
def test_steps_that_are_not_finite_are_counted_though_the_router_sees_none(ratio: float) -> None:
    model = model_of()
    torch.nn.init.constant_(model.blocks[-1].mlp.down.weight, torch.inf)  # above the blocks that the router runs
    step = gated(model, ratio)
    for number in (1, 2, 3, 8, 16):
        run(step, batch_of(4), number)
    report = step.report()
    assert report is not None
    assert report.nonfinite_steps == 3


def test_no_label_anywhere_gives_zero_gradients() -> None:
    step, batch = gated(model_of(), 0.5), batch_of(4, ignored=4)
    step.forward_backward(batch, global_tokens=0, step=1)
    assert all((p.grad == 0).all() for p in step.model.parameters() if p.grad is not None)


@pytest.mark.parametrize("layers", [1, 3])
def test_saved_flops_are_those_that_are_counted(layers: int) -> None:
    model, batch = model_of(), batch_of(4)
    gating = GatingSpec(granularity="Sequence", router_layers=layers)
    saved = saved_flops_ratio(SPEC, gating, vocab_size=VOCABULARY, sequence_length=12, ratio=0.5)
    counts = [
        flops(forward_backward(step, batch)) for step in (gated(model, 0.5, router_layers=layers), step_of(model))
    ]
    assert saved == pytest.approx(1 - counts[0] / counts[1], abs=0.03)
    assert saved > 0.1


def forward_backward(step: TrainingStep, batch: Batch) -> Callable[[], object]:
    return lambda: step.forward_backward(batch, global_tokens=48, step=5)


@pytest.mark.gpu
@pytest.mark.parametrize("selection", ["Sampled", "Top"])
def test_no_step_waits_for_the_device_and_the_gpu_agrees_with_the_cpu(
    selection: str, waiting_is_an_error: AbstractContextManager[None]
) -> None:
    batch = batch_of(6)
    _, expected = run(gated(model_of(), 0.5, selection=selection), batch)
    step, moved = gated(model_of().cuda(), 0.5, selection=selection), batch.to(torch.device("cuda"))
    run(step, moved, 4)  # the first pass may wait: libraries set themselves up
    step.model.zero_grad()
    torch.cuda.synchronize()
    with waiting_is_an_error:
        step.forward_backward(moved, global_tokens=72, step=5)
    gradient = torch.cat([p.grad.flatten().cpu() for p in step.model.parameters() if p.grad is not None])
    assert distance(gradient, expected) < 1e-3
