"""Steps give the gradients that a dense, masked and weighted loss gives, and say truly what they did."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pylon_api.training import Compile, DataSpec, GatingSpec, ModelSpec, Precision, ScheduleSpec, TrainingSpec
from pylon_trainer.gating import build_step
from pylon_trainer.gating.step import GatedStep
from pylon_trainer.kernels.head import gradients as head_gradients
from pylon_trainer.models import Transformer, build_model
from pylon_trainer.step import IGNORED, Batch, StepResult, TrainingStep

VOCABULARY = 61
CPU = torch.device("cpu")
SCORED = ["GradientNorm", "Entropy", "Loss", "Margin", "Combined", "Difficulty", "Random"]
SELECTIONS = ["Sampled", "Top", "Stratified", "SequenceAware"]


def model_of(**fields: object) -> Transformer:
    torch.manual_seed(0)
    spec = {"layers": 2, "hidden_size": 32, "heads": 2, "intermediate_size": 48, "initializer_std": 0.2}
    return build_model(ModelSpec.model_validate(spec | fields), vocab_size=VOCABULARY)


def step_of(
    model: Transformer,
    precision: Precision = Precision.FLOAT32,
    device: torch.device = CPU,
    compile: Compile = Compile.OFF,
    **gating: object,
) -> TrainingStep:
    training = TrainingSpec(
        data=DataSpec(train=["unused"]),
        schedule=ScheduleSpec(steps=10),
        precision=precision,
        compile=compile,
        gating=GatingSpec.model_validate({"ratio_control": "Fixed"} | gating),
        seed=3,
    )
    return build_step(model, training, device)


def batch_of(sequences: int = 3, length: int = 15, ignored: int = 4, seed: int = 0) -> Batch:
    """Random tokens; the first `ignored` labels of each sequence are left out."""
    draws = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(0, VOCABULARY, (sequences, length), generator=draws)
    labels_BT = torch.randint(0, VOCABULARY, (sequences, length), generator=draws)
    labels_BT[:, :ignored] = IGNORED
    return Batch(tokens_BT, labels_BT)


def labelled(batch: Batch) -> int:
    return int((batch.labels_BT != IGNORED).sum())


def run(step: TrainingStep, batch: Batch, number: int = 5) -> tuple[StepResult, dict[str, Tensor]]:
    """One pass; the result and the gradients it left."""
    step.model.zero_grad()
    result = step.forward_backward(batch, global_tokens=labelled(batch), step=number)
    return result, gradients(step.model)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def dense(
    model: Transformer, batch: Batch, weights_N: Tensor, precision: Precision
) -> tuple[Tensor, dict[str, Tensor]]:
    """The reference: all logits at once, each token's loss times its weight, one backward pass."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is Precision.BFLOAT16):
        logits_NV = model.head(model(batch.tokens_BT, batch.documents_BT)).flatten(0, 1).float()
    losses_N = F.cross_entropy(logits_NV, batch.labels_BT.flatten(), ignore_index=IGNORED, reduction="none")
    ((losses_N * weights_N).sum() / labelled(batch)).backward()
    return losses_N.detach().sum(), gradients(model)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        difference = (actual[name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert difference < tolerance, name


def in_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """45 rows in chunks of 8, 61 columns in chunks of 8."""
    for limit in ("ROW_CHUNK_BYTES", "COLUMN_CHUNK_BYTES"):
        monkeypatch.setattr(head_gradients, limit, {"cpu": 1})
    monkeypatch.setattr(head_gradients, "CHUNK_MULTIPLE", 8)


PRECISIONS = [(Precision.FLOAT32, 1e-5), (Precision.BFLOAT16, 2e-2)]


@pytest.mark.parametrize(("precision", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("model_fields", [{}, {"tie_embeddings": False}, {"embedding_rank": 8}])
def test_plain_equals_dense(
    model_fields: dict[str, object], precision: Precision, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_small_chunks(monkeypatch)
    model, batch = model_of(**model_fields), batch_of()
    result, actual = run(step_of(model, precision), batch)

    loss_sum, expected = dense(model, batch, torch.ones(45), precision)
    assert_same(actual, expected, tolerance)
    # A factorised head is multiplied out, which rounds bfloat16 elsewhere.
    assert result.loss_sum.item() == pytest.approx(
        loss_sum.item(), rel=1e-3 if "embedding_rank" in model_fields else 1e-5
    )
    assert int(result.tokens) == int(result.gated_tokens) == 33
    assert int(result.nonfinite_rows) == 0


@pytest.mark.parametrize(("precision", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("selection", ["Sampled", "Top"])
@pytest.mark.parametrize("strategy", SCORED)
def test_gated_equals_dense_with_the_selected_weights(
    strategy: str, selection: str, precision: Precision, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_small_chunks(monkeypatch)
    model, batch = model_of(), batch_of()
    step = step_of(model, precision, strategy=strategy, selection=selection, token_ratio=0.4)
    assert isinstance(step, GatedStep)
    seen = []
    choose = step._gate.choose

    def remember(*arguments: object) -> object:
        seen.append(choose(*arguments))
        return seen[-1]

    monkeypatch.setattr(step._gate, "choose", remember)
    result, actual = run(step, batch)

    rows_K, weights_K = seen[0]
    weights_N = torch.zeros(45).index_add(0, rows_K, weights_K)
    loss_sum, expected = dense(model, batch, weights_N, precision)
    assert_same(actual, expected, tolerance)
    assert result.loss_sum.item() == pytest.approx(loss_sum.item(), rel=1e-5)  # of every token, gated or not
    assert int(result.tokens) == 33
    assert int(result.gated_tokens) == len(rows_K) == 18


def test_sampled_gradients_are_unbiased() -> None:
    """The mean over many steps' draws approaches the plain gradient; a biased gate would stay away from it."""
    model, batch = model_of(layers=1), batch_of(sequences=2, length=12, ignored=0)
    plain = flat(run(step_of(model), batch)[1])

    def bias(selection: str, draws: int) -> float:
        step = step_of(model, strategy="GradientNorm", selection=selection, token_ratio=0.25)
        mean = torch.stack([flat(run(step, batch, number)[1]) for number in range(draws)]).mean(0)
        return float((mean - plain).norm() / plain.norm())

    assert bias("Sampled", 200) < 0.16  # falls as 1 / sqrt(draws)
    assert bias("Top", 1) > 0.3


def flat(named: dict[str, Tensor]) -> Tensor:
    return torch.cat([named[name].flatten() for name in sorted(named)])


ENGINES = [
    {"engine": engine, "kv_gradient": kv_gradient, "row_activations": activations}
    for engine, kv_gradient, activations in (
        ("HeadOnly", "Truncated", "Keep"),
        ("SinglePass", "Truncated", "Keep"),
        ("SinglePass", "Dense", "Recompute"),
    )
]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("ratio", [1, 0.999])  # the plain pass; the engine, with every row
@pytest.mark.parametrize("selection", SELECTIONS)
def test_ratio_one_equals_plain(selection: str, ratio: float, engine: dict[str, str]) -> None:
    model, batch = model_of(), batch_of()
    _, plain = run(step_of(model), batch)
    gating = {"strategy": "GradientNorm", "selection": selection, "token_ratio": ratio}
    result, gated = run(step_of(model, **gating, **engine), batch)
    assert_same(gated, plain, 1e-5)
    assert ratio < 1 or all(torch.equal(gated[name], gradient) for name, gradient in plain.items())
    assert int(result.gated_tokens) == int(result.tokens)


@pytest.mark.parametrize("engine", ENGINES)
def test_by_default_a_gate_begins_with_plain_steps_and_looks_at_one_in_eight(engine: dict[str, str]) -> None:
    model, batch = model_of(), batch_of()
    _, plain = run(step_of(model), batch)
    step = step_of(model, strategy="GradientNorm", ratio_control="GradientMass", **engine)
    for number in range(10):
        result, gated = run(step, batch, number)
        assert_same(gated, plain, 1e-5)
        assert int(result.gated_tokens) == int(result.tokens) == 33
        assert (result.difficulty is not None) == (number in (0, 8))
    report = step.report()
    assert report is not None
    assert (report.ratio, report.reason) == (1, "measuring the time of a plain step")


@pytest.mark.parametrize("gating", [{}, *({"strategy": "Loss", "token_ratio": 0.999} | engine for engine in ENGINES)])
def test_micro_batches_add_up_to_the_batch(gating: dict[str, object]) -> None:
    model, batch = model_of(), batch_of(sequences=4)
    step = step_of(model, **gating)
    _, whole = run(step_of(model), batch)
    model.zero_grad()
    results = [step.forward_backward(part, global_tokens=labelled(batch), step=5) for part in batch.split(1)]
    assert_same(gradients(model), whole, 1e-5)
    assert sum(int(result.tokens) for result in results) == 44


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_fewer_labels_than_rows(selection: str, engine: dict[str, str]) -> None:
    """The rest of the rows are tokens without label, each once: gradients through attention count them once too."""
    model, batch = model_of(layers=1), batch_of(sequences=1, ignored=13)
    _, plain = run(step_of(model), batch)
    gating = {"strategy": "Loss", "selection": selection, "token_ratio": 0.99}
    result, gated = run(step_of(model, **gating, **engine), batch)
    assert_same(gated, plain, 1e-5)
    assert int(result.gated_tokens) == 2


def test_draws_follow_from_seed_and_step_alone() -> None:
    model, batch = model_of(), batch_of()
    gating = {"strategy": "Entropy", "token_ratio": 0.3}
    first = step_of(model, **gating)
    passes = {number: run(first, batch, number)[1] for number in (6, 7, 8)}
    _, resumed = run(step_of(model, **gating), batch, 8)

    assert_same(resumed, passes[8], 1e-9)
    # Two starts may lie so close that they fall on the same rows; three seldom do.
    assert any(not torch.equal(resumed["embedding.weight"], passes[number]["embedding.weight"]) for number in (6, 7))


def test_micro_batches_of_a_step_are_drawn_differently() -> None:
    model, batch = model_of(), batch_of()
    step = step_of(model, strategy="Random", token_ratio=0.3)
    first, second = run(step, batch, 7)[1], run(step, batch, 7)[1]
    assert not torch.equal(first["embedding.weight"], second["embedding.weight"])


@pytest.mark.parametrize(
    "gating", [{}, *({"strategy": "GradientNorm", "token_ratio": 0.5} | engine for engine in ENGINES)]
)
@pytest.mark.parametrize("precision", list(Precision))
def test_a_batch_without_labels_gives_zero_and_no_nan(gating: dict[str, object], precision: Precision) -> None:
    model = model_of()
    batch = batch_of(sequences=1, ignored=15)
    step = step_of(model, precision, **gating)
    result = step.forward_backward(batch, global_tokens=0, step=0)
    assert float(result.loss_sum) == int(result.tokens) == int(result.gated_tokens) == 0
    assert all((gradient == 0).all() for gradient in gradients(model).values())


NOT_FINITE = ["nan", "inf", "-inf"]


def break_logits(model: Transformer, logit: str) -> None:
    """From now on the last token of the vocabulary, which is no label, has this logit everywhere."""
    assert model.output is not None
    with torch.no_grad():
        model.output.weight[-1] = float(logit)
    model.norm.register_forward_hook(lambda _, __, hidden: hidden * 0 + 1)  # a sum of one sign


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("logit", NOT_FINITE)
@pytest.mark.parametrize(
    "gating",
    [
        {},
        *({"strategy": strategy, "token_ratio": 0.1} for strategy in SCORED),
        {"strategy": "Loss", "selection": "Top"},
    ],
    ids=str,
)
def test_logits_that_are_not_finite_are_counted_and_leave_no_finite_gradient(
    gating: dict[str, object], logit: str, precision: Precision
) -> None:
    """Even where the loss itself is finite: a probability of zero hides an infinite logit from it."""
    model, batch = model_of(tie_embeddings=False), batch_of()
    batch.labels_BT.clamp_(max=VOCABULARY - 2)
    break_logits(model, logit)
    step = step_of(model, precision, **gating)
    result, broken = run(step, batch)
    assert int(result.nonfinite_rows) == 33
    assert result.loss_sum.isnan()
    norm = torch.nn.utils.get_total_norm(broken.values())
    assert not norm.isfinite()  # what the optimizer skips the step by
    assert step.evaluate(batch).loss_sum.isnan()


@pytest.mark.parametrize("gating", [{}, {"strategy": "GradientNorm", "token_ratio": 0.5}], ids=str)
def test_a_broken_row_without_a_label_is_not_counted(gating: dict[str, object]) -> None:
    model, batch = model_of(tie_embeddings=False), batch_of(ignored=15)
    break_logits(model, "inf")
    result = step_of(model, **gating).forward_backward(batch, global_tokens=0, step=0)
    assert int(result.nonfinite_rows) == float(result.loss_sum) == 0


def test_one_labelled_token() -> None:
    model, batch = model_of(), batch_of(sequences=1, ignored=14)
    _, plain = run(step_of(model), batch)
    result, gated = run(step_of(model, strategy="Loss", token_ratio=0.1), batch)
    assert_same(gated, plain, 1e-5)
    assert int(result.gated_tokens) == 1


def test_evaluation_leaves_no_gradient_and_agrees_with_training() -> None:
    model, batch = model_of(), batch_of()
    documents_BT = (torch.arange(15) // 6).int().expand(3, -1).contiguous()
    batch = dataclasses.replace(batch, documents_BT=documents_BT)
    step = step_of(model, strategy="Margin")
    evaluated = step.evaluate(batch)
    assert gradients(model) == {}
    assert float(evaluated.loss_sum) == pytest.approx(float(run(step, batch)[0].loss_sum), rel=1e-5)


def test_compiled_blocks_share_one_graph_without_breaks_and_give_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More blocks than torch compiles one function for (8), so that one graph for each would show.

    The backend counts the graphs and runs them as they are: code generation is torch's business, and slow.
    """
    batch, gating = batch_of(), {"strategy": "GradientNorm", "token_ratio": 0.5}
    expected_loss, expected = run(step_of(model_of(layers=10), **gating), batch)
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module: compile_module(module, backend=count, fullgraph=True)
    )
    step = step_of(model_of(layers=10), compile=Compile.DEFAULT, **gating)
    result, actual = run(step, batch)
    assert_same(actual, expected, 1e-6)
    assert float(result.loss_sum) == pytest.approx(float(expected_loss.loss_sum), rel=1e-6)
    assert len(graphs) == 1
    step.evaluate(batch)
    assert len(graphs) == 2  # the one without gradients


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("strategy", ["Disabled", *SCORED])
def test_no_step_waits_for_the_device_and_the_gpu_agrees_with_the_cpu(
    strategy: str, selection: str, engine: dict[str, str], waiting_is_an_error: AbstractContextManager[None]
) -> None:
    device = torch.device("cuda")
    gating = {"strategy": strategy, "selection": "Sampled" if strategy == "Random" else selection} | engine
    batch = dataclasses.replace(batch_of(), documents_BT=(torch.arange(15) // 6).int().expand(3, -1).contiguous())
    _, expected = run(step_of(model_of(), **gating), batch)

    step = step_of(model_of().to(device), device=device, **gating)
    moved = batch.to(device)
    run(step, moved, 4)  # the first pass may wait: libraries set themselves up
    torch.cuda.synchronize()
    with waiting_is_an_error:
        step.model.zero_grad()
        step.forward_backward(moved, global_tokens=labelled(batch), step=5)
        step.evaluate(moved)
    assert_same({name: gradient.cpu() for name, gradient in gradients(step.model).items()}, expected, 1e-3)
