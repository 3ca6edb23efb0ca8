"""The sparse engine gives the gradients of a dense pass whose keys and values are detached where no row was chosen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pylon_api.training import KvGradient, ModelSpec, RowActivations
from pylon_trainer.gating.engine import SinglePass
from pylon_trainer.gating.gradients import accumulate
from pylon_trainer.models import Transformer, build_model
from pylon_trainer.models.context import Context
from pylon_trainer.models.transformer import Block
from pylon_trainer.step import Batch

VOCABULARY = 37
SEQUENCES, LENGTH = 3, 13
TOKENS = SEQUENCES * LENGTH

MODELS = {
    "plain": {},
    "grouped": {"heads": 4, "kv_heads": 2},
    "untied": {"tie_embeddings": False},
    "factorised": {"embedding_rank": 8},
}
ROWS = {
    "all": list(range(TOKENS)),
    "half": list(range(0, TOKENS, 2)),
    "quarter": list(range(1, TOKENS, 4)),
    "uneven": [0, *range(13, 26), 38],  # one sequence whole, the others with one row each
    "one": [17],
    "none": [],
}


def model_of(**fields: object) -> Transformer:
    torch.manual_seed(0)
    spec = {"layers": 3, "hidden_size": 32, "heads": 2, "intermediate_size": 48, "initializer_std": 0.2}
    return build_model(ModelSpec.model_validate(spec | fields), vocab_size=VOCABULARY)


def batch_of(isolated: bool = False) -> Batch:
    tokens_BT = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
    documents_BT = (torch.arange(LENGTH) // 5).int().expand(SEQUENCES, -1).contiguous()
    return Batch(tokens_BT, tokens_BT, documents_BT if isolated else None)


def gradient_of(rows: int) -> Tensor:
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(2))


def autocast(enabled: bool) -> contextlib.AbstractContextManager[object]:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled, cache_enabled=False)


def run(
    model: Transformer,
    batch: Batch,
    rows: list[int],
    kv_gradient: KvGradient = KvGradient.TRUNCATED,
    activations: RowActivations = RowActivations.KEEP,
    bfloat16: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states and gradients of the engine."""
    model.zero_grad()
    engine = SinglePass(
        model,
        lambda: autocast(bfloat16),
        activations=activations,
        kv_gradient=kv_gradient,
        compile_backend=backend,
    )
    hidden_ND, back = engine.forward(batch)
    assert not hidden_ND.requires_grad
    back(torch.tensor(rows, dtype=torch.int64), gradient_of(len(rows)), accumulate)
    return hidden_ND, gradients(model)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def reference(
    model: Transformer, batch: Batch, rows: list[int], kv_gradient: KvGradient, bfloat16: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same in one dense autograd graph that is cut by detaching."""
    model.zero_grad()
    chosen_N = torch.zeros(TOKENS, dtype=torch.bool)
    chosen_N[rows] = True
    chosen_BT1 = chosen_N.view(SEQUENCES, LENGTH, 1)
    chosen_B1T1 = chosen_BT1.unsqueeze(1)

    def through(block: Block, x_BTD: Tensor, context: Context) -> Tensor:
        attention = block.attention
        seen_BTD = block.attention_norm(torch.where(chosen_BT1, x_BTD, x_BTD.detach()))
        k, v = attention.keys_values(seen_BTD, context)
        if kv_gradient is KvGradient.TRUNCATED:
            k, v = (torch.where(chosen_B1T1, x, x.detach()) for x in (k, v))

        class Cut(Context):
            def attend(self, q: Tensor, *_: Tensor) -> Tensor:
                return context.attend(q, k, v)

        return block(x_BTD, Cut(context.places, context.cos, context.sin, context.starts_BT, context.mask))

    with autocast(bfloat16):
        context = model.context(batch.tokens_BT, batch.documents_BT)
        x_BTD = model.embed(batch.tokens_BT, context.places)
        for block in model.blocks:
            x_BTD = through(block, x_BTD, context)
        hidden_ND = model.norm(x_BTD).flatten(0, 1)
    (hidden_ND[rows] * gradient_of(len(rows))).sum().backward()
    return hidden_ND.detach(), gradients(model)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        difference = (actual[name] - gradient).norm() / gradient.norm().clamp_min(1e-6)
        assert difference < tolerance, f"{name}: {difference}"


@pytest.mark.parametrize("activations", list(RowActivations))
@pytest.mark.parametrize("kv_gradient", list(KvGradient))
@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS.keys())
def test_gradients_equal_the_cut_dense_ones(
    fields: dict[str, object], kv_gradient: KvGradient, activations: RowActivations
) -> None:
    model, batch = model_of(**fields), batch_of()
    hidden_ND, actual = run(model, batch, ROWS["half"], kv_gradient, activations)
    expected_ND, expected = reference(model, batch, ROWS["half"], kv_gradient)
    torch.testing.assert_close(hidden_ND, expected_ND, rtol=1e-6, atol=1e-6)
    assert_same(actual, expected, 1e-5)


@pytest.mark.parametrize("isolated", [False, True], ids=["one document", "isolated documents"])
@pytest.mark.parametrize("kv_gradient", list(KvGradient))
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_any_rows(rows: list[int], kv_gradient: KvGradient, isolated: bool) -> None:
    model, batch = model_of(heads=4, kv_heads=2), batch_of(isolated)
    assert_same(run(model, batch, rows, kv_gradient)[1], reference(model, batch, rows, kv_gradient)[1], 1e-5)


def test_all_rows_equal_the_uncut_gradient() -> None:
    model, batch = model_of(), batch_of()
    _, actual = run(model, batch, ROWS["all"])
    model.zero_grad()
    (model(batch.tokens_BT).flatten(0, 1) * gradient_of(TOKENS)).sum().backward()
    assert_same(actual, gradients(model), 1e-5)


@pytest.mark.parametrize("activations", list(RowActivations))
@pytest.mark.parametrize("kv_gradient", list(KvGradient))
@pytest.mark.parametrize("rows", ["all", "half", "uneven"])
def test_bfloat16(rows: str, kv_gradient: KvGradient, activations: RowActivations) -> None:
    model, batch = model_of(heads=4, kv_heads=2, embedding_rank=8), batch_of()
    _, actual = run(model, batch, ROWS[rows], kv_gradient, activations, bfloat16=True)
    _, expected = reference(model, batch, ROWS[rows], kv_gradient, bfloat16=True)
    assert_same(actual, expected, 2e-2)


def test_the_options_differ_where_they_should() -> None:
    """Guards the tests above: truncated, dense and uncut gradients are three different things."""
    model, batch = model_of(), batch_of()
    truncated, dense = (run(model, batch, ROWS["half"], option)[1] for option in KvGradient)
    model.zero_grad()
    (model(batch.tokens_BT).flatten(0, 1)[ROWS["half"]] * gradient_of(len(ROWS["half"]))).sum().backward()
    uncut = gradients(model)
    for name in ("blocks.2.attention.key.weight", "blocks.2.attention.value.weight", "blocks.2.attention_norm.weight"):
        torch.testing.assert_close(dense[name], uncut[name], rtol=1e-4, atol=1e-5)  # the top block's are exact
        assert (truncated[name] - uncut[name]).norm() > 0.05 * uncut[name].norm()
    assert (dense["embedding.weight"] - uncut["embedding.weight"]).norm() > 0.05 * uncut["embedding.weight"].norm()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kv_gradient", "activations", "bfloat16", "isolated"),
    [
        (KvGradient.TRUNCATED, RowActivations.KEEP, True, False),
        (KvGradient.DENSE, RowActivations.KEEP, False, True),
        (KvGradient.DENSE, RowActivations.RECOMPUTE, False, False),
    ],
)
def test_every_piece_compiles_without_a_graph_break(
    kv_gradient: KvGradient, activations: RowActivations, bfloat16: bool, isolated: bool
) -> None:
    torch._dynamo.reset()
    model, batch = model_of(heads=4, kv_heads=2, layers=2), batch_of(isolated)
    for rows in ("half", "quarter"):  # the second count of rows shows that shapes may change
        _, eager = run(model, batch, ROWS[rows], kv_gradient, activations, bfloat16)
        _, compiled = run(model, batch, ROWS[rows], kv_gradient, activations, bfloat16, backend="aot_eager")
        assert_same(compiled, eager, 2e-2 if bfloat16 else 1e-5)


@pytest.mark.parametrize("kv_gradient", list(KvGradient))
@pytest.mark.parametrize("activations", list(RowActivations))
@pytest.mark.parametrize("share", [1, 2, 4])
def test_backward_flops_fall_with_the_rows(share: int, activations: RowActivations, kv_gradient: KvGradient) -> None:
    """Counted products: of the linear layers, r of the plain backward pass (3/2 r with recomputation), and a little for
    the attention, whose queries run again in tiles that are not quite full."""
    model, batch = model_of(hidden_size=64, intermediate_size=160, heads=2), batch_of()
    rows = torch.arange(0, TOKENS, share)
    forward = flops(lambda: model(batch.tokens_BT))
    plain = flops(lambda: model(batch.tokens_BT).sum().backward()) - forward

    engine = SinglePass(
        model,
        lambda: autocast(False),
        activations=activations,
        kv_gradient=kv_gradient,
        compile_backend=None,
    )
    _, back = engine.forward(batch)
    ratio = flops(lambda: back(rows, torch.ones(len(rows), 64), accumulate)) / plain

    passes = 1.0 if activations is RowActivations.KEEP else 1.5
    # The dense option runs the products of keys and values, a sixth of the linear layers' here, for all tokens as well.
    dense = passes * 2 * 64 * 64 / (4 * 64 * 64 + 3 * 64 * 160) if kv_gradient is KvGradient.DENSE else 0.0
    assert len(rows) / TOKENS * 0.95 * passes < ratio < len(rows) / TOKENS * passes + dense + 0.05
    assert flops(lambda: engine.forward(batch)) == forward


def flops(call: Callable[[], object]) -> int:
    """Attention included: only its plain form is counted on a CPU."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        call()
    return counter.get_total_flops()


def test_frozen_weights_get_no_gradient() -> None:
    model, batch = model_of(), batch_of()
    _, expected = run(model, batch, ROWS["half"])
    frozen = [name for name, _ in model.named_parameters() if "mlp" in name or "embedding" in name]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    _, actual = run(model, batch, ROWS["half"])
    assert_same(actual, {name: gradient for name, gradient in expected.items() if name not in frozen}, 1e-6)
