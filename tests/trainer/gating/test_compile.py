"""Compiled engines: no graph break, one graph for all blocks and all numbers of rows, the same gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engines import RESONATE, assert_same, batch_of, depth_of, engine_of, model_of, run

RATIOS = [7, 13, 20, 39]
"""Numbers of rows, of 39. Fewer leave one row to a tile, and a size of one is always compiled apart."""
BLOCKS = 10
"""More than torch compiles one function for (8), so that a graph for each block would show."""


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A backend that counts graphs, and traces their way back without generating code for either."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        compiled: Callable[..., Any] = torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
        return compiled


@pytest.mark.slow
@pytest.mark.parametrize(  # those that between them run every piece in every way
    "name",
    [
        "SinglePass-Truncated-Keep",
        "SinglePass-Dense-Keep",
        "SinglePass-Dense-Recompute",
        "TwoPass-Truncated-Recompute",
    ],
)
def test_a_ladder_of_ratios_compiles_once(name: str) -> None:
    bfloat16, isolated = "Keep" in name, "Recompute" in name  # each setting under some engine
    model, batch, backend = model_of(layers=BLOCKS, heads=4, kv_heads=2), batch_of(isolated=isolated), Counting()
    compiled, eager = (
        engine_of(name, model, bfloat16=bfloat16, backend=chosen, depth_buckets=2) for chosen in (backend, None)
    )
    graphs = []
    for rows, depth in [*((rows, None) for rows in RATIOS), (39, depth_of(39, buckets=2, opened=1))]:
        chosen = list(range(39))[:: 39 // rows][:rows]
        _, actual = run(compiled, model, batch, chosen, depth)
        _, expected = run(eager, model, batch, chosen, depth)
        assert_same(actual, expected, 2e-2 if bfloat16 else 1e-5)
        graphs.append(backend.graphs)
    # The block for all tokens; for rows, with a graph or (first, when they are recomputed) without; keys and values.
    pieces = 2 + (name == "TwoPass-Truncated-Recompute") + ("Dense" in name)
    assert graphs == [pieces] * len(graphs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SinglePass-Dense-Recompute", "TwoPass-Truncated-Recompute"])
def test_mixers_compile_once_as_well(name: str) -> None:
    own = {"stateSize": 8, "headWidth": 16, "chunkTokens": 4, "attentionEvery": 0, "activation": "Binlop"}
    resonate = RESONATE | {"layers": BLOCKS, "resonate": own}
    model, batch, backend = model_of(**resonate), batch_of(isolated=True), Counting()
    compiled, eager = (engine_of(name, model, backend=chosen) for chosen in (backend, None))
    for rows in RATIOS[1:3]:
        chosen = list(range(39))[:: 39 // rows][:rows]
        assert_same(run(compiled, model, batch, chosen)[1], run(eager, model, batch, chosen)[1], 1e-5)
        assert backend.graphs == 3


@pytest.mark.slow
def test_generated_code_gives_the_same_gradients() -> None:
    model, batch = model_of(layers=2, heads=4, kv_heads=2), batch_of()
    compiled, eager = (engine_of("SinglePass-Truncated-Keep", model, backend=chosen) for chosen in ("inductor", None))
    rows = list(range(0, 39, 3))
    assert_same(run(compiled, model, batch, rows)[1], run(eager, model, batch, rows)[1], 1e-5)
