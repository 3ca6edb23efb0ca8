"""The gated norm: kernels against the reference, the reference against torch's own norm."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pylon_trainer.kernels import gated_norm
from pylon_trainer.kernels.gated_norm import operators, reference

EPSILON = 1e-5
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Of whole tensors, relative, beside float64: a unit in the last place, as the interpreter cuts digits off; of float32
some, as it sums."""


@dataclass(frozen=True)
class Case:
    """Random inputs of a shape."""

    sequences: int = 2
    tokens: int = 7
    heads: int = 6
    head_width: int = 8
    groups: int = 1
    aside: int = 8
    """Channels beside values and gate in the rows that they are a part of, on either side."""

    def leaves(
        self, dtype: torch.dtype, device: torch.device | str, y_dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        """y, values, skip, gate and weight."""
        channels, aside = self.heads * self.head_width, self.aside
        rows = torch.randn(3, self.sequences, self.tokens, channels + 2 * aside, device=device).to(dtype)
        values, gate = rows[:2, ..., aside : aside + channels]
        y = rows[2, ..., :channels].contiguous().to(y_dtype or dtype)
        skip, weight = (torch.randn(length, device=device) for length in (self.heads, channels))
        return [leaf.requires_grad_() for leaf in (y, values, skip, gate, weight)]


CASES = {
    "one tile": Case(),
    "odd": Case(tokens=9, heads=3, head_width=13, aside=3),
    "groups": Case(groups=3),
    "odd groups": Case(heads=9, head_width=5, groups=3, aside=5),
    "several tiles": Case(heads=4, head_width=75, aside=2),
    "groups of several tiles": Case(tokens=3, heads=4, head_width=150, groups=2),
    "one token": Case(sequences=1, tokens=1),
    "whole parts": Case(tokens=8, heads=4, head_width=32),
    "one head": Case(heads=1, head_width=48),
    "heads of a channel": Case(heads=48, head_width=1),
    "no token": Case(tokens=0),
    "no sequence": Case(sequences=0),
}


@pytest.fixture
def fused(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    """The operator, with small tiles where it is interpreted, so that a few tokens span several parts and steps."""
    triton = pytest.importorskip("pylon_trainer.kernels.gated_norm.triton")
    if device.type == "cpu":
        for name in ("FORWARD", "BACKWARD"):
            monkeypatch.setattr(triton, name, triton.Tiling(tokens=4, tiles=4, vector=2, warps=4, stages=2))
    return operators.gated_norm


def with_gradients(norm, leaves: list[Tensor], groups: int) -> list[Tensor]:
    """What came out, and the gradient at every leaf, of a loss that is the same in every run."""
    y = norm(*leaves, groups, EPSILON)
    draws = torch.Generator().manual_seed(1)
    d_y = torch.randn(y.shape, generator=draws).bfloat16().to(y)  # a number of every type
    return [y.detach(), *torch.autograd.grad(y, leaves, d_y)]


def exact(leaves: list[Tensor]) -> list[Tensor]:
    return [leaf.detach().double().requires_grad_() for leaf in leaves]


def assert_kernels_agree(norm, leaves: list[Tensor], groups: int) -> None:
    actual, expected = with_gradients(norm, leaves, groups), with_gradients(reference.gated_norm, exact(leaves), groups)
    gate = leaves[3]
    for number, (ours, theirs, like) in enumerate(zip(actual, expected, [gate, *leaves], strict=True)):
        assert (ours.shape, ours.dtype) == (theirs.shape, like.dtype)
        error = (ours.double() - theirs).norm() / theirs.norm().clamp(min=1e-9)
        assert error <= TOLERANCE[gate.dtype], f"relative error {error:.2e} of result {number}"


@pytest.mark.parametrize("name", CASES)
def test_kernels_agree_with_the_reference(fused, device, name) -> None:
    assert_kernels_agree(fused, CASES[name].leaves(torch.float32, device), CASES[name].groups)


@pytest.mark.parametrize("y_dtype", [torch.bfloat16, torch.float32])
def test_kernels_agree_in_half_precision(fused, device, y_dtype) -> None:
    assert_kernels_agree(fused, CASES["groups"].leaves(torch.bfloat16, device, y_dtype), 3)


def test_no_token_and_no_group_hears_of_another(fused, device) -> None:
    """Not even of one that is not finite."""
    leaves = [leaf.detach() for leaf in CASES["groups"].leaves(torch.float32, device)]
    before = fused(*leaves, 3, EPSILON)
    leaves[0][1, 4, 20] = torch.nan
    after = fused(*leaves, 3, EPSILON)
    assert after[1, 4, 16:32].isnan().all()
    assert torch.equal(after.isnan().sum(), torch.tensor(16, device=device))
    assert torch.equal(after[~after.isnan()], before[~after.isnan()])


def test_kernels_take_any_strides(fused, device) -> None:
    leaves = [leaf.detach() for leaf in Case().leaves(torch.float32, device)]
    expected = fused(*leaves, 1, EPSILON)
    for strided in (
        [x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim == 3 else x for x in leaves],
        [x.mT.contiguous().mT if x.ndim == 3 else x[:, None].expand(-1, 2).contiguous()[:, 0] for x in leaves],
    ):
        assert torch.equal(fused(*strided, 1, EPSILON), expected)


@pytest.mark.parametrize("groups", [1, 3])
def test_equals_torchs_norm(anywhere, groups) -> None:
    leaves = Case().leaves(torch.float32, anywhere)
    ours = gated_norm.gated_norm(*leaves, groups=groups, epsilon=EPSILON)
    y, values, skip, gate, weight = exact(leaves)
    gated = (y + skip.repeat_interleave(8) * values) * F.silu(gate)
    normed = F.rms_norm(gated.unflatten(-1, (groups, -1)), (48 // groups,), eps=EPSILON).flatten(-2)
    torch.testing.assert_close(ours.double(), weight * normed, rtol=1e-5, atol=1e-5)


def test_weights_of_half_precision_round_once(anywhere) -> None:
    """As where a whole model is: the product of skip and values is not rounded before y joins it."""
    leaves = [leaf.detach().bfloat16() for leaf in Case().leaves(torch.bfloat16, anywhere)]
    ours = gated_norm.gated_norm(*leaves, groups=1, epsilon=EPSILON)
    expected = gated_norm.gated_norm(*(leaf.float() for leaf in leaves), groups=1, epsilon=EPSILON)
    assert ours.dtype == torch.bfloat16
    assert (ours - expected).norm() <= 3e-3 * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 700, heads=24, head_width=64, aside=24),
        Case(3, 129, heads=20, head_width=64, groups=2, aside=4),
        Case(1, 1000, heads=24, head_width=16, groups=1),
        Case(1, 301, heads=7, head_width=191, aside=5),
        Case(1, 70, heads=40, head_width=1, groups=40),
        Case(1, 65, heads=128, head_width=128),
    ],
)
def test_kernels_at_full_size(case, dtype) -> None:
    """Against float64, and twice, to the same bits."""
    leaves = case.leaves(dtype, "cuda")
    assert_kernels_agree(operators.gated_norm, leaves, case.groups)
    first, second = (with_gradients(operators.gated_norm, leaves, case.groups) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_offsets_are_not_limited_to_31_bits() -> None:
    tokens, channels = 2**17, 17000
    gate = torch.ones(1, tokens, channels, device="cuda", dtype=torch.bfloat16)
    gate[0, -1] = 4
    small = gate[:, -2:].clone()
    skip, weight = torch.ones(1, device="cuda"), torch.ones(channels, device="cuda")
    expected = operators.gated_norm(small, small, skip, small, weight, 1, EPSILON)
    leaf = gate.requires_grad_()
    y = operators.gated_norm(gate.detach(), gate.detach(), skip, leaf, weight, 1, EPSILON)
    assert torch.equal(y[:, -2:], expected)
    (d_gate,) = torch.autograd.grad(y, leaf, y.detach())
    assert torch.equal(d_gate[:, 0], d_gate[:, -2])
    del y, d_gate, leaf, gate
    # Rows that far apart, of which there are but two.
    far = torch.zeros(2**31 + 16, device="cuda", dtype=torch.bfloat16).as_strided((2, 1, 16), (2**31, 16, 1))
    far[1] = 1
    near, ones = far.contiguous(), torch.ones(16, device="cuda")
    expected = operators.gated_norm(near, near, skip, near, ones, 1, EPSILON)
    assert torch.equal(operators.gated_norm(far, far, skip, far, ones, 1, EPSILON), expected)


@pytest.mark.gpu
def test_compiled_blocks_call_the_kernels_without_a_graph_break() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(operators.gated_norm, fullgraph=True)
    leaves = Case(2, 70, heads=12).leaves(torch.bfloat16, "cuda")
    for ours, theirs in zip(
        with_gradients(compiled, leaves, 1), with_gradients(operators.gated_norm, leaves, 1), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
def test_float64_is_refused_on_cuda() -> None:
    y, values, skip, gate, weight = Case().leaves(torch.float32, "cuda")
    with pytest.raises(ValueError, match=r"values are torch\.float64, the gate is torch\.float32; give"):
        gated_norm.gated_norm(y, values.double(), skip, gate, weight, groups=1, epsilon=EPSILON)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"y": (2, 9, 5)}, r"y \(2, 9, 5\)"),
        ({"values": (2, 8, 6)}, r"values \(2, 8, 6\)"),
        ({"gate": (9, 6)}, r"gate \(9, 6\)"),
        ({"skip": (4,)}, r"skip \(4,\)"),
        ({"skip": (3, 1)}, r"skip \(3, 1\)"),
        ({"weight": (5,)}, r"weight \(5,\)"),
        ({"groups": 4}, "the 4 groups"),
    ],
)
def test_bad_input_is_named(changes, complaint) -> None:
    rows = dict.fromkeys(("y", "values", "gate"), (2, 9, 6))
    shapes = {**rows, "skip": (3,), "weight": (6,), "groups": 2} | changes
    groups = shapes.pop("groups")
    y, values, gate, skip, weight = (torch.zeros(shape) for shape in shapes.values())
    with pytest.raises(ValueError, match=complaint):
        gated_norm.gated_norm(y, values, skip, gate, weight, groups=groups, epsilon=EPSILON)
