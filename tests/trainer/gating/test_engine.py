"""Engines give the gradients of a dense pass that is cut where they say, at a cost that falls with the rows."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from engines import (
    ADAPTED,
    DENSE,
    ENGINES,
    RESONATE,
    ROW_ENGINES,
    TRUNCATED,
    assert_same,
    batch_of,
    depth_of,
    engine_of,
    gradient_of,
    gradients,
    kv_gradient_of,
    model_of,
    reference,
    run,
)
from flops import flops

TOKENS = 3 * 13

MODELS = {
    "plain": {},
    "grouped": {"heads": 4, "kv_heads": 2},
    "untied": {"tie_embeddings": False},
    "factorised": {"embedding_rank": 8},
    "resonate": RESONATE,
    "binlop": RESONATE | {"resonate": RESONATE["resonate"] | {"activation": "Binlop"}},
    "adapted": ADAPTED,
}
ROWS = {
    "all": list(range(TOKENS)),
    "half": list(range(0, TOKENS, 2)),
    "quarter": list(range(1, TOKENS, 4)),
    "uneven": [0, *range(13, 26), 38],  # one sequence whole, the others with one row each
    "one": [17],
    "none": [],
}


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS.keys())
def test_gradients_equal_the_cut_dense_ones(fields: dict[str, object], name: str) -> None:
    model, batch = model_of(**fields), batch_of()
    hidden_ND, actual = run(engine_of(name, model), model, batch, ROWS["half"])
    expected_ND, expected = reference(model, batch, ROWS["half"], kv_gradient_of(name))
    torch.testing.assert_close(hidden_ND, expected_ND, rtol=1e-6, atol=1e-6)
    assert_same(actual, expected, 1e-5)


@pytest.mark.parametrize("isolated", [False, True], ids=["one document", "isolated documents"])
@pytest.mark.parametrize(
    "name", ["HeadOnly", "SinglePass-Truncated-Keep", "SinglePass-Dense-Keep", "TwoPass-Truncated-Keep"]
)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_any_rows(rows: list[int], name: str, isolated: bool) -> None:
    model, batch = model_of(heads=4, kv_heads=2), batch_of(isolated=isolated)
    _, actual = run(engine_of(name, model), model, batch, rows)
    assert_same(actual, reference(model, batch, rows, kv_gradient_of(name))[1], 1e-5)


@pytest.mark.parametrize("name", ENGINES)
def test_states_begin_anew_with_each_document_for_rows_too(name: str) -> None:
    model, batch = model_of(**RESONATE), batch_of(isolated=True)
    _, actual = run(engine_of(name, model), model, batch, ROWS["uneven"])
    assert_same(actual, reference(model, batch, ROWS["uneven"], kv_gradient_of(name))[1], 1e-5)


@pytest.mark.parametrize("name", ENGINES)
def test_all_rows_equal_the_uncut_gradient(name: str) -> None:
    model, batch = model_of(), batch_of()
    _, actual = run(engine_of(name, model), model, batch, ROWS["all"])
    assert_same(actual, reference(model, batch, ROWS["all"], None)[1], 1e-5)


def test_the_options_differ_where_they_should() -> None:
    """Guards the tests above: truncated, dense and uncut gradients are three different things."""
    model, batch = model_of(), batch_of()
    truncated, dense, uncut = (reference(model, batch, ROWS["half"], cut)[1] for cut in (TRUNCATED, DENSE, None))
    for name in ("blocks.2.attention.key.weight", "blocks.2.attention.value.weight", "blocks.2.attention_norm.weight"):
        torch.testing.assert_close(dense[name], uncut[name], rtol=1e-4, atol=1e-5)  # the top block's are exact
        assert (truncated[name] - uncut[name]).norm() > 0.05 * uncut[name].norm()
    assert (dense["embedding.weight"] - uncut["embedding.weight"]).norm() > 0.05 * uncut["embedding.weight"].norm()


PASSES = {"SinglePass": {"Keep": 2, "Recompute": 3}, "TwoPass": {"Keep": 3, "Recompute": 4}}
"""What r is multiplied by in the cost of a step, in forward passes: 1 + 2r and so on (engine.py)."""


@pytest.mark.parametrize("name", ROW_ENGINES)
@pytest.mark.parametrize("share", [1, 2, 4, 8])
def test_flops_of_a_step_stay_within_the_bound(share: int, name: str) -> None:
    """Counted products of the linear layers, and a little for the attention, whose queries run again in tiles that are
    not quite full."""
    model, batch = model_of(hidden_size=64, intermediate_size=160), batch_of()
    rows = list(range(0, TOKENS, share))
    engine_name, kv_gradient, activations = name.split("-")
    engine = engine_of(name, model)
    forward = flops(lambda: model(batch.tokens_BT))
    assert flops(lambda: engine.forward(batch)) == forward

    passes = PASSES[engine_name][activations]
    bound = 1 + passes * len(rows) / TOKENS
    # The dense option runs the products of keys and values, a sixth of the linear layers' here, for all tokens as well.
    dense = passes * 2 * 64 * 64 / (4 * 64 * 64 + 3 * 64 * 160) if kv_gradient == "Dense" else 0.0
    cost = flops(lambda: run(engine, model, batch, rows)) / forward
    assert 0.97 * bound < cost < 1.03 * bound + dense + 0.04


@pytest.mark.parametrize("name", ["SinglePass-Truncated-Keep", "TwoPass-Truncated-Keep"])
def test_flops_fall_with_the_depths(name: str) -> None:
    """Four buckets of equal size keep 100, 75, 50 and 25 percent of the blocks: 62.5 percent of the rows' products."""
    model, batch = model_of(hidden_size=64, intermediate_size=160, layers=4), batch_of()
    rows = ROWS["half"]
    forward = flops(lambda: model(batch.tokens_BT))
    costs = [
        flops(lambda depth=depth: run(engine_of(name, model, depth_buckets=4), model, batch, rows, depth)) - forward
        for depth in (None, depth_of(len(rows)), depth_of(len(rows), leak_rate=1.0))
    ]
    assert costs[1] / costs[0] == pytest.approx(0.625, abs=0.02)
    assert costs[2] == costs[0]


def test_activation_memory_of_the_second_pass_falls_with_the_rows() -> None:
    """What autograd holds between the two passes of TwoPass: keys and values of all tokens are held beside it."""
    model, batch = model_of(hidden_size=64, intermediate_size=160), batch_of()

    def held(rows: list[int]) -> int:
        tensors: dict[int, int] = {}

        def hold(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.dtype is torch.float32 and tensor.shape[0] == 1:  # of the rows; not weights, keys and values
                tensors[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            run(engine_of("TwoPass-Truncated-Keep", model), model, batch, rows)
        return sum(tensors.values())

    assert held(ROWS["quarter"]) < 0.3 * held(ROWS["all"])


@pytest.mark.parametrize("name", ENGINES)
def test_frozen_weights_get_no_gradient_and_cost_none(name: str) -> None:
    model, batch = model_of(), batch_of()
    _, expected = run(engine_of(name, model), model, batch, ROWS["half"])
    cost = flops(lambda: run(engine_of(name, model), model, batch, ROWS["half"]))
    frozen = [key for key, _ in model.named_parameters() if "mlp" in key or "embedding" in key]
    for key in frozen:
        model.get_parameter(key).requires_grad_(False)
    _, actual = run(engine_of(name, model), model, batch, ROWS["half"])
    assert_same(actual, {key: gradient for key, gradient in expected.items() if key not in frozen}, 1e-6)
    tokens = TOKENS if name == "HeadOnly" else len(ROWS["half"])
    assert cost - flops(lambda: run(engine_of(name, model), model, batch, ROWS["half"])) == 2 * 3 * tokens * 3 * 32 * 48


@pytest.mark.parametrize("name", ENGINES)
def test_a_sink_takes_the_place_of_grad(name: str) -> None:
    model, batch = model_of(), batch_of()
    _, expected = run(engine_of(name, model), model, batch, ROWS["half"])
    model.zero_grad()
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    sunk: dict[str, torch.Tensor] = {}

    def sink(parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
        sunk[names[id(parameter)]] = gradient

    with torch.no_grad():  # as within an autograd.Function
        _, back = engine_of(name, model).forward(batch)
        back(torch.tensor(ROWS["half"]), gradient_of(len(ROWS["half"])), sink)
    assert_same(sunk, expected, 1e-6)
    assert gradients(model) == {}


@pytest.mark.slow
def test_an_eager_step_does_not_import_the_compiler() -> None:
    """torch._dynamo and sympy take seconds to import: a small run on CPUs should not wait for them."""
    code = """
import sys
from engines import *
for name in ENGINES:
    model = model_of()
    run(engine_of(name, model), model, batch_of(), [1, 2])
assert not {"sympy", "torch._dynamo"} & sys.modules.keys(), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
