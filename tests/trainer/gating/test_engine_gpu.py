"""Engines on a GPU: the CPU's gradients, no wait, no recompilation, and memory that falls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
import torch
from engines import (
    ENGINES,
    ROW_ENGINES,
    assert_same,
    batch_of,
    depth_of,
    engine_of,
    kv_gradient_of,
    model_of,
    reference,
    run,
)
from torch import Tensor

from pylon_trainer.gating.gradients import accumulate, send_back
from pylon_trainer.gating.recall import multiply

pytestmark = pytest.mark.gpu
SHAPE = {"hidden_size": 128, "heads": 4, "kv_heads": 2, "intermediate_size": 192, "initializer_std": 0.1, "layers": 4}
SEQUENCES, LENGTH = 4, 96
ROWS = {share: list(range(0, SEQUENCES * LENGTH, share)) for share in (1, 2, 4, 7)}


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """Float32 products as the CPU's; a compiler without graphs of other tests."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    torch._dynamo.reset()
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(
    ("bfloat16", "isolated", "backend"),
    [(False, True, None), (True, False, None), (True, True, "inductor")],
    ids=["float32-packed-eager", "bfloat16-eager", "bfloat16-packed-compiled"],
)
@pytest.mark.parametrize("name", ENGINES)
def test_gradients_equal_the_cpus_and_no_step_waits(
    name: str, bfloat16: bool, isolated: bool, backend: str | None, waiting_is_an_error: AbstractContextManager[None]
) -> None:
    model, batch = model_of(**SHAPE), batch_of(SEQUENCES, LENGTH, isolated)
    depth = None if name == "HeadOnly" else depth_of(len(ROWS[4]), leak_rate=0.3)
    _, expected = reference(model, batch, ROWS[4], kv_gradient_of(name), depth=depth)
    model.cuda()
    if depth is not None:
        depth = depth_of(len(ROWS[4]), leak_rate=0.3, ranks_K=depth.ranks_K.cuda())
    engine, moved = (
        engine_of(name, model, bfloat16=bfloat16, backend=backend, depth_buckets=4),
        batch.to(torch.device("cuda")),
    )
    _, actual = run(engine, model, moved, ROWS[4], depth)
    on_cpu = {key: gradient.cpu() for key, gradient in actual.items()}
    assert all(gradient.dtype is torch.float32 for gradient in on_cpu.values())
    assert_same(on_cpu, expected, 6e-2 if bfloat16 else 1e-3)

    rows_K = torch.tensor(ROWS[4], device="cuda")
    gradient_KD = torch.randn(len(ROWS[4]), SHAPE["hidden_size"], device="cuda")
    torch.cuda.synchronize()
    with waiting_is_an_error:
        _, back = engine.forward(moved)
        back(rows_K, gradient_KD, accumulate, depth)


@pytest.mark.parametrize("name", ROW_ENGINES)
def test_no_ratio_compiles_anew(name: str) -> None:
    model, batch = model_of(**SHAPE).cuda(), batch_of(SEQUENCES, LENGTH).to(torch.device("cuda"))
    engine = engine_of(name, model, bfloat16=True, backend="inductor")
    run(engine, model, batch, ROWS[4])
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in ROWS.values():
            run(engine, model, batch, rows)


def test_gradients_of_weights_are_written_in_float32() -> None:
    """Sums of 4096 products of bfloat16 numbers, without a rounding to bfloat16 at the end."""
    layer = torch.nn.Linear(64, 64).cuda()
    x_KI, gradient_KO = torch.randn(2, 4096, 64, device="cuda").bfloat16()
    multiply(layer, x_KI, torch.bfloat16).output.backward(gradient_KO)
    exact = gradient_KO.double().T @ x_KI.double()
    assert layer.weight.grad is not None
    error = (layer.weight.grad - exact).norm() / exact.norm()
    assert error < 1e-5  # bfloat16 would leave 2e-3
    assert layer.bias.grad is not None
    assert layer.bias.grad.dtype is torch.float32


@pytest.mark.parametrize(("name", "share"), [("TwoPass-Truncated-Keep", 0.5), ("TwoPass-Truncated-Recompute", 0.4)])
def test_activations_of_two_passes_take_half_of_the_plain_steps_at_a_quarter_of_the_rows(
    name: str, share: float
) -> None:
    shape = {"hidden_size": 512, "heads": 8, "intermediate_size": 1408, "layers": 8}
    model, batch = model_of(**shape).cuda(), batch_of(8, 1024).to(torch.device("cuda"))
    for block in model.blocks:
        block.compile()
    rows_K = torch.arange(0, 8 * 1024, 4, device="cuda")
    gradient_KD = torch.randn(len(rows_K), 512, device="cuda")
    engine = engine_of(name, model, bfloat16=True, backend="inductor")

    def gated() -> None:
        engine.forward(batch)[1](rows_K, gradient_KD, accumulate)

    def plain() -> None:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            hidden_BTD: Tensor = model(batch.tokens_BT)
        send_back(hidden_BTD, torch.ones_like(hidden_BTD))

    assert peak_of(gated) < share * peak_of(plain)


def peak_of(step: Callable[[], None]) -> int:
    """Bytes beyond weights and gradients, once everything is compiled."""
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before
