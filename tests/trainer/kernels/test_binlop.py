"""The gated product of BiNLOP: kernels against the reference, the reference's way back against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pylon_trainer.kernels import binlop
from pylon_trainer.kernels.binlop import reference

COEFFICIENTS = (0.5, 1.5, 0.8, 0.6)
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 8e-3}
"""Of gradients and products, relative: a unit in the last place of bfloat16, a few of float32."""


def coefficients(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(COEFFICIENTS, device=device, dtype=dtype)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
    """Gate, up and the gradient of y; gates lie on every line, and some are 0."""
    gate, up, d_y = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    gate = gate * 1.5
    gate.flatten()[3::7] = 0
    return [gate, up, d_y]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * 1e-3)


@pytest.fixture
def fused(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    """The kernels with small tiles where they are interpreted, so that a few elements span several."""
    triton = pytest.importorskip("pylon_trainer.kernels.binlop.triton")
    if device.type == "cpu":
        monkeypatch.setattr(triton, "BLOCK", 64)
    return triton


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1,), (64,), (3, 5, 7), (2, 129)])
def test_kernels_agree_with_the_reference(fused, device, shape, dtype) -> None:
    gate, up, d_y = inputs(shape, dtype, device)
    y = fused.gated(gate, up, coefficients(device))
    assert_close(y, reference.gated(gate, up, coefficients(device)), TOLERANCE[dtype])
    actual = fused.gated_backward(d_y, gate, y, coefficients(device))
    expected = reference.gated_backward(d_y, gate, y, coefficients(device))
    for ours, theirs in zip(actual[:2], expected[:2], strict=True):
        assert_close(ours, theirs, TOLERANCE[dtype])
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-4, atol=1e-4)


def test_kernels_take_strided_inputs_and_none_at_all(fused, device) -> None:
    gate, up, d_y = inputs((6, 10), torch.float32, device)
    strided = [x.T.contiguous().T for x in (gate, up, d_y)]
    y = fused.gated(*strided[:2], coefficients(device))
    assert_close(y, reference.gated(gate, up, coefficients(device)), 5e-6)
    d_gate, d_up, _ = fused.gated_backward(strided[2], strided[0], y, coefficients(device))
    expected = reference.gated_backward(d_y, gate, y, coefficients(device))
    assert_close(d_gate, expected[0], 5e-6)
    assert_close(d_up, expected[1], 5e-6)
    empty = gate[:0]
    assert fused.gated(empty, empty, coefficients(device)).shape == (0, 10)
    assert fused.gated_backward(empty, empty, empty, coefficients(device))[2].tolist() == [0.0] * 4


def test_gradients_are_autograds_to_the_digits_of_float64() -> None:
    gate, up, _ = (x.double().requires_grad_() for x in inputs((4, 9), torch.float64, "cpu"))
    gate.data[gate == 0] = 0.1  # a difference quotient would step over what counts as 0
    assert torch.autograd.gradcheck(binlop.gated, (gate, up, coefficients(dtype=torch.float64).requires_grad_()))


def with_gradients(gated, gate: Tensor, up: Tensor, d_y: Tensor) -> list[Tensor]:
    """The product, and the gradients of gate, up and coefficients."""
    leaves = [x.detach().clone().requires_grad_() for x in (gate, up, coefficients(gate.device))]
    y = gated(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, d_y)]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gradients_are_those_of_the_plain_expression(anywhere, dtype) -> None:
    """Also where the gate is 0, which the product would not tell from any other `up`."""
    gate, up, d_y = inputs((33, 40), dtype, anywhere)

    def plain(gate: Tensor, up: Tensor, coefficients_4: Tensor) -> Tensor:
        return (reference.bend(gate.float(), coefficients_4) * up).to(gate.dtype)

    actual = with_gradients(binlop.gated, gate, up, d_y)
    expected = with_gradients(plain, gate, up, d_y)
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours - theirs).norm() <= TOLERANCE[dtype] * theirs.norm()
    at_zero = gate == 0
    torch.testing.assert_close(actual[1][at_zero], expected[1][at_zero], rtol=2 * TOLERANCE[dtype], atol=0)


def test_nothing_is_held_but_gate_and_product() -> None:
    gate, up, _ = inputs((16, 16), torch.float32, "cpu")
    gate, up = gate.requires_grad_(), up.requires_grad_()
    held: list[Tensor] = []

    def hold(x: Tensor) -> Tensor:
        held.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
        y = binlop.gated(gate, up, coefficients())
    assert {x.data_ptr() for x in held if x.numel() > 4} == {gate.data_ptr(), y.data_ptr()}


def test_a_gradient_that_is_not_finite_stays_so() -> None:
    """The optimizer skips such a step, so it must see it."""
    gate, up, d_y = inputs((8,), torch.float32, "cpu")
    up[2] = torch.inf
    d_y[5] = torch.nan
    _, d_gate, d_up, d_coefficients = with_gradients(binlop.gated, gate, up, d_y)
    assert not d_gate[2].isfinite()
    assert not d_gate[5].isfinite()
    assert not d_up[5].isfinite()
    assert not d_coefficients.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(4096, 2048), (1000, 1367), (1, 7)])
def test_kernels_at_full_size(shape, dtype) -> None:
    """Against float64, and twice, to the same bits."""
    gate, up, d_y = inputs(shape, dtype, "cuda")
    first, second = (with_gradients(binlop.gated, gate, up, d_y) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    expected = with_gradients(
        lambda gate, up, c: reference.bend(gate, c) * up, gate.double(), up.double(), d_y.double()
    )
    for ours, theirs in zip(first, expected, strict=True):
        assert (ours.double() - theirs).norm() <= TOLERANCE[dtype] * theirs.norm()


@pytest.mark.gpu
def test_compiled_blocks_call_the_kernels_without_a_graph_break() -> None:
    torch._dynamo.reset()
    gate, up, d_y = inputs((64, 96), torch.bfloat16, "cuda")
    compiled = torch.compile(binlop.gated, fullgraph=True)
    for ours, theirs in zip(
        with_gradients(compiled, gate, up, d_y), with_gradients(binlop.gated, gate, up, d_y), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("gate", "up", "complaint"),
    [
        (torch.zeros(3, 4), torch.zeros(3, 5), r"gate \(3, 4\) torch.float32 and up \(3, 5\)"),
        (torch.zeros(3), torch.zeros(3).bfloat16(), "must be alike"),
        (torch.zeros(3).half(), torch.zeros(3).half(), "give float32 or bfloat16"),
    ],
)
def test_bad_input_is_named(gate, up, complaint) -> None:
    with pytest.raises(ValueError, match=complaint):
        binlop.gated(gate, up, coefficients())
