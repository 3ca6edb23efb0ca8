"""The chunked scan computes the recurrence, whatever the chunks, documents and decays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from pylon_api.training import ScanKernel
from pylon_trainer.models.resonate import scan as module
from pylon_trainer.models.resonate.kernel import scan
from pylon_trainer.models.resonate.scan import chunked_scan, scan_token, sequential_scan

SEQUENCES, TOKENS, HEADS, WIDTH, GROUPS, SIZE = 2, 37, 4, 6, 2, 5


def arguments_of(tokens: int = TOKENS, slowness: float = 1.0, seed: int = 0) -> list[Tensor]:
    """Values, steps, poles, write and read; a larger slowness makes states last longer."""
    draws = torch.Generator().manual_seed(seed)
    values = torch.randn(SEQUENCES, tokens, HEADS, WIDTH, generator=draws)
    steps = torch.rand(SEQUENCES, tokens, HEADS, generator=draws) / slowness
    poles = -8 * torch.rand(HEADS, generator=draws)
    maps = [torch.randn(SEQUENCES, tokens, GROUPS, SIZE, generator=draws) for _ in range(2)]
    return [x.requires_grad_() for x in (values, steps, poles, *maps)]


def starts_of(*lengths: tuple[int, ...]) -> Tensor:
    """First places of documents of these lengths, one tuple for each sequence."""
    return torch.stack(
        [torch.cat([torch.full((length,), sum(of[:i])) for i, length in enumerate(of)]).long() for of in lengths]
    )


STARTS = starts_of((5, 1, 1, 9, 21), (16, 16, 5))
STATE = torch.randn(SEQUENCES, HEADS, SIZE, WIDTH, generator=torch.Generator().manual_seed(3))


def gradients_of(results: tuple[Tensor, Tensor], arguments: list[Tensor]) -> tuple[Tensor, ...]:
    loss = sum((result * result.sin()).sum() for result in results)
    return torch.autograd.grad(loss, arguments)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 16, 64])
@pytest.mark.parametrize("span_chunks", [2, 128])
@pytest.mark.parametrize(
    "given", [{}, {"starts_BT": STARTS}, {"state_BHNP": STATE}], ids=["plain", "documents", "state"]
)
@pytest.mark.parametrize("slowness", [0.3, 10.0])
def test_chunks_equal_the_recurrence_with_gradients(
    chunk_tokens: int, span_chunks: int, given: dict[str, Tensor], slowness: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SPAN_CHUNKS", span_chunks)
    arguments = arguments_of(slowness=slowness)
    results = chunked_scan(*arguments, chunk_tokens=chunk_tokens, **given)
    expected = sequential_scan(*arguments, **given)
    torch.testing.assert_close(results, expected, rtol=1e-4, atol=2e-5)

    for ours, theirs in zip(gradients_of(results, arguments), gradients_of(expected, arguments), strict=True):
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()


@pytest.mark.parametrize("cut", [1, 16, 20, 36])
def test_a_scan_goes_on_from_the_state_that_it_left(cut: int) -> None:
    arguments = arguments_of()
    whole, end = chunked_scan(*arguments, chunk_tokens=16)
    values, steps, poles, *maps = arguments
    first, state = chunked_scan(values[:, :cut], steps[:, :cut], poles, *(x[:, :cut] for x in maps), chunk_tokens=16)
    second, other_end = chunked_scan(
        values[:, cut:], steps[:, cut:], poles, *(x[:, cut:] for x in maps), chunk_tokens=16, state_BHNP=state
    )
    torch.testing.assert_close(torch.cat((first, second), 1), whole)
    torch.testing.assert_close(other_end, end)


def test_one_token_is_one_turn_of_the_recurrence() -> None:
    values, steps, poles, *maps = (x.detach() for x in arguments_of(tokens=1))
    y, state = scan(values, steps, poles, *maps, chunk_tokens=16, kernel=ScanKernel.PYTORCH, state_BHNP=STATE)
    expected, expected_state = chunked_scan(values, steps, poles, *maps, chunk_tokens=16, state_BHNP=STATE)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(state, expected_state)
    alone, _ = scan_token(values[:, 0], steps[:, 0], poles, *(x[:, 0] for x in maps), STATE)
    torch.testing.assert_close(alone, y[:, 0])


@pytest.mark.parametrize("documents", [False, True])
def test_no_token_hears_of_a_later_one_or_of_another_document(documents: bool) -> None:
    values, steps, poles, *maps = (x.detach() for x in arguments_of())
    given: dict[str, Any] = {"chunk_tokens": 8} | ({"starts_BT": STARTS} if documents else {})
    before, _ = chunked_scan(values, steps, poles, *maps, **given)
    changed = values.clone()
    changed[:, 16:] += 1  # where documents begin in both sequences
    after, _ = chunked_scan(changed, steps, poles, *maps, **given)
    assert torch.equal(before[:, :16], after[:, :16])

    changed = values.clone()
    changed[:, :16] += 1
    after, _ = chunked_scan(changed, steps, poles, *maps, **given)
    assert torch.equal(before[:, 16:], after[:, 16:]) == documents


@pytest.mark.parametrize("step", [0.0, 1e-6, 1e6])
def test_no_decay_overflows(step: float) -> None:
    arguments = arguments_of()
    arguments[1] = torch.full_like(arguments[1], step).requires_grad_()
    results = chunked_scan(*arguments, chunk_tokens=16)
    torch.testing.assert_close(results, sequential_scan(*arguments), rtol=1e-4, atol=1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients_of(results, arguments))


def test_a_short_decay_keeps_its_digits_after_a_long_one() -> None:
    """Running sums in float32 would lose them: 1e5 + 1e-3 is 1e5."""
    values, steps, poles, *maps = (x.detach() for x in arguments_of(slowness=1000.0))
    steps[:, 0] = 1e5
    y, _ = chunked_scan(values, steps, poles, *maps, chunk_tokens=64)
    torch.testing.assert_close(y[:, 1:], sequential_scan(values, steps, poles, *maps)[0][:, 1:], rtol=1e-4, atol=1e-5)


def test_equals_transformers() -> None:
    values, steps, poles, *maps = arguments_of()
    y, state = chunked_scan(values, steps, poles, *maps, chunk_tokens=16)
    expected, their_state = mamba2_chunk_scan(values, steps, poles, *maps, chunk_size=16, return_final_states=True)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, their_state.mT, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_close_to_float32() -> None:
    values, steps, poles, *maps = (x.detach() for x in arguments_of())
    exact, _ = chunked_scan(values, steps, poles, *maps, chunk_tokens=16)
    y, _ = chunked_scan(values.bfloat16(), steps, poles, *(x.bfloat16() for x in maps), chunk_tokens=16)
    assert y.dtype == torch.bfloat16
    assert (y.float() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ScanKernel)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(kernel: ScanKernel, documents: bool, dtype: torch.dtype) -> None:
    """By each kernel, against the recurrence in float32."""
    draws = torch.Generator().manual_seed(0)
    values = torch.randn(2, 300, 4, 64, generator=draws)
    steps, poles = 0.1 * torch.rand(2, 300, 4, generator=draws), -8 * torch.rand(4, generator=draws)
    maps = [torch.randn(2, 300, 1, 64, generator=draws) / 8 for _ in range(2)]
    starts = starts_of((100, 3, 197), (256, 44)).cuda() if documents else None
    exact = [x.cuda().requires_grad_() for x in (values, steps, poles, *maps)]
    cast = [
        x.detach().to(dtype if number in (0, 3, 4) else torch.float32).requires_grad_()
        for number, x in enumerate(exact)
    ]
    y, state = scan(*cast, chunk_tokens=64, kernel=kernel, starts_BT=starts)
    expected, expected_state = sequential_scan(*exact, starts_BT=starts)
    tolerance = 0.02 if dtype is torch.bfloat16 else 1e-4
    assert (y.float() - expected).norm() < tolerance * expected.norm()
    assert (state - expected_state).norm() < tolerance * expected_state.norm()
    weights = torch.randn(y.shape, generator=draws).cuda()
    ours = torch.autograd.grad((y.float() * weights).sum(), cast)
    theirs = torch.autograd.grad((expected * weights).sum(), exact)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.float() - b).norm() < 2 * tolerance * b.norm()
