"""The short convolution: kernels against the reference, the reference against torch's own convolution."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pylon_trainer.kernels import convolution
from pylon_trainer.kernels.convolution import operators, reference

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Of whole tensors, relative, beside float64: a unit in the last place, as the interpreter cuts digits off; of float32
some, as it sums."""


@dataclass(frozen=True)
class Case:
    """Random inputs of a shape; documents by their lengths, one tuple for each sequence."""

    sequences: int = 1
    tokens: int = 11
    channels: int = 24
    width: int = 4
    documents: tuple[tuple[int, ...], ...] = ()
    continues: bool = False
    """Whether there are tokens before."""
    aside: int = 8
    """Channels beside x in the rows that it is a part of, on either side."""

    def leaves(self, dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
        """x, weight, bias and perhaps recent inputs."""
        aside = self.aside
        rows = torch.randn(self.sequences, self.tokens, self.channels + 2 * aside, device=device).to(dtype)
        weight = torch.randn(self.channels, self.width, device=device)
        leaves = [rows[..., aside : aside + self.channels], weight, torch.randn(self.channels, device=device)]
        if self.continues:
            leaves.append(torch.randn(self.sequences, self.width - 1, self.channels, device=device).to(dtype))
        return [leaf.requires_grad_() for leaf in leaves]

    def starts_BT(self, device: torch.device | str) -> Tensor | None:
        starts = [[sum(of[:n]) for n, length in enumerate(of) for _ in range(length)] for of in self.documents]
        return torch.tensor(starts, device=device) if starts else None


CASES = {
    "odd": Case(tokens=9, channels=13, aside=3),
    "documents": Case(sequences=2, documents=((5, 1, 1, 4), (8, 3))),
    "recent": Case(sequences=2, continues=True),
    "recent and documents": Case(continues=True, documents=((5, 1, 1, 4),)),
    "one token": Case(tokens=1, continues=True),
    "fewer tokens than seen": Case(tokens=2, continues=True),
    "whole parts": Case(tokens=16, channels=16),
    "one tap": Case(width=1),
    "wide": Case(tokens=6, width=7, continues=True),
}


@pytest.fixture
def fused(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    """The operator, with small tiles where it is interpreted, so that a few tokens and channels span several."""
    triton = pytest.importorskip("pylon_trainer.kernels.convolution.triton")
    if device.type == "cpu":
        for name in ("FORWARD", "BACKWARD"):
            monkeypatch.setattr(triton, name, triton.Tiling(tokens=8, rows=4, channels=16, warps=4))
    return operators.convolve


def with_gradients(convolve, leaves: list[Tensor], starts_BT: Tensor | None) -> list[Tensor]:
    """What came out, and the gradient at every leaf, of a loss that is the same in every run."""
    x, weight, bias, recent = [*leaves, None][:4]
    y = convolve(x, weight, bias, starts_BT, recent)
    draws = torch.Generator().manual_seed(1)
    d_y = torch.randn(y.shape, generator=draws).bfloat16().to(y)  # a number of every type
    return [y.detach(), *torch.autograd.grad(y, leaves, d_y)]


def exact(leaves: list[Tensor]) -> list[Tensor]:
    return [leaf.detach().double().requires_grad_() for leaf in leaves]


def assert_kernels_agree(convolve, case: Case, dtype: torch.dtype, device: torch.device) -> None:
    leaves, starts_BT = case.leaves(dtype, device), case.starts_BT(device)
    actual = with_gradients(convolve, leaves, starts_BT)
    expected = with_gradients(reference.convolve, exact(leaves), starts_BT)
    for number, (ours, theirs, like) in enumerate(zip(actual, expected, [leaves[0], *leaves], strict=True)):
        assert (ours.shape, ours.dtype) == (theirs.shape, like.dtype)
        error = (ours.double() - theirs).norm() / theirs.norm().clamp(min=1e-9)
        assert error <= TOLERANCE[dtype], f"relative error {error:.2e} of result {number}"


@pytest.mark.parametrize("name", CASES)
def test_kernels_agree_with_the_reference(fused, device, name) -> None:
    assert_kernels_agree(fused, CASES[name], torch.float32, device)


def test_kernels_agree_in_half_precision(fused, device) -> None:
    assert_kernels_agree(fused, CASES["recent"], torch.bfloat16, device)


def test_no_token_hears_of_a_later_one_or_of_another_document(fused, device) -> None:
    """Not even of one that is not finite."""
    case = Case(documents=((6, 5),))
    leaves, starts_BT = [leaf.detach() for leaf in case.leaves(torch.float32, device)], case.starts_BT(device)
    before = fused(*leaves, starts_BT, None)
    for changed, others in ((slice(6), slice(6, None)), (slice(6, None), slice(6))):
        x = leaves[0].clone()
        x[:, changed] = torch.nan
        after = fused(x, *leaves[1:], starts_BT, None)
        assert torch.equal(before[:, others], after[:, others])
        assert after[:, changed].isnan().all()


def test_kernels_take_any_strides(fused, device) -> None:
    x, weight, bias = (leaf.detach() for leaf in Case(sequences=2, tokens=5).leaves(torch.float32, device))
    expected = fused(x, weight, bias, None, None)
    for strided in (x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT):
        assert torch.equal(fused(strided, weight.T.contiguous().T, bias, None, None), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_torchs_convolution(anywhere, dtype) -> None:
    leaves = Case(tokens=30).leaves(dtype, anywhere)
    (x, weight, bias), (x64, weight64, bias64) = leaves, exact(leaves)
    y, latest = convolution.convolve(x, weight, bias)
    sums = F.conv1d(F.pad(x64.mT, (3, 0)), weight64.unsqueeze(1), bias64, groups=len(bias)).mT
    expected = F.silu(sums)
    assert (y.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    assert torch.equal(latest, x[:, -3:])


@pytest.mark.parametrize("cuts", [(5, 11), (1, 2, 3, 11), (10, 11)])
def test_parts_of_a_text_are_as_the_whole(anywhere, cuts) -> None:
    """Each takes what the one before left."""
    x, weight, bias = (leaf.detach() for leaf in Case().leaves(torch.float32, anywhere))
    whole, latest = convolution.convolve(x, weight, bias)
    parts, recent = [], None
    for begin, end in zip((0, *cuts), cuts, strict=False):
        part, recent = convolution.convolve(x[:, begin:end], weight, bias, recent_BVU=recent)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-6, atol=1e-6)
    assert recent is not None
    assert torch.equal(recent, latest)


def test_the_last_inputs_carry_gradients(anywhere) -> None:
    x, weight, bias, recent = Case(tokens=2, continues=True).leaves(torch.float32, anywhere)
    _, latest = convolution.convolve(x, weight, bias, recent_BVU=recent)
    d_x, d_recent = torch.autograd.grad(latest.sum(), (x, recent))
    assert (d_x == 1).all()
    assert d_recent.sum((0, 2)).tolist() == [0, 0, 24]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 700, 1792, documents=((300, 3, 397), (256, 444)), aside=24),
        Case(1, 1000, 1367, continues=True, aside=5),
        Case(3, 129, 1536, width=16, continues=True),
    ],
)
def test_kernels_at_full_size(case, dtype) -> None:
    """Against float64, and twice, to the same bits."""
    device = torch.device("cuda")
    assert_kernels_agree(operators.convolve, case, dtype, device)
    leaves, starts_BT = case.leaves(dtype, device), case.starts_BT(device)
    first, second = (with_gradients(operators.convolve, leaves, starts_BT) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_offsets_are_not_limited_to_31_bits() -> None:
    tokens, channels = 2**17, 17000
    x = torch.zeros(1, tokens, channels, device="cuda", dtype=torch.bfloat16)
    x[0, -2:] = 1
    weight, bias = torch.ones(channels, 4, device="cuda"), torch.zeros(channels, device="cuda")
    y = operators.convolve(x, weight, bias, None, None)
    expected = F.silu(torch.tensor([0.0, 1.0, 2.0])).bfloat16().cuda()
    assert torch.equal(y[0, -3:], expected[:, None].expand(-1, channels))
    del x, y
    far = torch.zeros(2**31 + 9 * 16, device="cuda", dtype=torch.bfloat16).as_strided((2, 9, 16), (2**31, 16, 1))
    far[1] = 1
    inputs = weight[:16], bias[:16], None, None
    assert torch.equal(operators.convolve(far, *inputs), operators.convolve(far.contiguous(), *inputs))


@pytest.mark.gpu
def test_compiled_blocks_call_the_kernels_without_a_graph_break() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(operators.convolve, fullgraph=True)
    case = Case(2, 70, 96)
    leaves = case.leaves(torch.bfloat16, "cuda")
    for ours, theirs in zip(
        with_gradients(compiled, leaves, None), with_gradients(operators.convolve, leaves, None), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"weight": (5, 4)}, r"weight \(5, 4\)"),
        ({"bias": (4,)}, r"bias \(4,\)"),
        ({"recent": (2, 4, 6)}, r"recent inputs \(2, 4, 6\)"),
    ],
)
def test_bad_input_is_named(changes, complaint) -> None:
    shapes = {"x": (2, 9, 6), "weight": (6, 4), "bias": (6,), "recent": (2, 3, 6)} | changes
    x, weight, bias, recent = (torch.zeros(shape) for shape in shapes.values())
    with pytest.raises(ValueError, match=complaint):
        convolution.convolve(x, weight, bias, recent_BVU=recent)
