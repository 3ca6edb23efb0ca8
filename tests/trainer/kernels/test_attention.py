"""Attention of scattered rows: kernels against the reference, the reference against masked attention of all rows."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel

from pylon_trainer.kernels import attention
from pylon_trainer.kernels.attention import Attended, Layout, fused_attend_all, fused_attend_rows, reference

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    """Random inputs of a shape; rows as a list, starts by name."""

    rows: list[int]
    starts: str = "none"
    sequences: int = 3
    tokens: int = 23
    heads: int = 2
    kv_heads: int = 1
    width: int = 16

    def layout(self, device: torch.device) -> Layout:
        rows_K = torch.tensor(self.rows, dtype=torch.int64, device=device)
        starts_N = self.starts_BT(device).flatten()
        starts_K = None if self.starts == "none" else starts_N[rows_K]
        return Layout.of(rows_K, starts_K, self.sequences, self.tokens)

    def starts_BT(self, device: torch.device) -> Tensor:
        """First token that each may see: documents that end elsewhere in every sequence, or a window."""
        t = torch.arange(self.tokens, device=device).expand(self.sequences, -1)
        b = torch.arange(self.sequences, device=device)[:, None]
        third = self.tokens // 3
        documents = torch.where(t > third + b, third + 1 + b, 0) + torch.where(t > 2 * third, third - 1 - b, 0)
        window = (t - third // 2).clamp(min=0)
        return {"none": torch.zeros_like(t), "documents": documents, "window": window}[self.starts]

    def leaves(self, dense: bool, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """Queries, keys, values and, unless dense, the rows' own; strided as a model has them."""
        rows_K = torch.tensor(self.rows, dtype=torch.int64, device=device)
        q_KHE = torch.randn(len(self.rows), self.heads, self.width, device=device).to(dtype)
        k_BJTE = torch.randn(self.sequences, self.kv_heads, self.tokens, self.width, device=device).to(dtype)
        v_BTJE = torch.randn(self.sequences, self.tokens, self.kv_heads, self.width, device=device).to(dtype)
        leaves = [q_KHE.transpose(0, 1), k_BJTE, v_BTJE.transpose(1, 2)]
        if not dense:
            leaves += [x_BJTE.transpose(0, 1).flatten(1, 2)[:, rows_K] for x_BJTE in leaves[1:]]
        return [leaf.detach().requires_grad_(dense or index not in (1, 2)) for index, leaf in enumerate(leaves)]


CASES = {
    "scattered": Case([*range(1, 46, 4), 60]),
    "grouped": Case([0, 5, 6, *range(24, 32), 45, 46], heads=3, width=24),
    "one sequence": Case(list(range(23, 46)), heads=1),
    "one row": Case([45], heads=2, kv_heads=2),
    "no row": Case([]),
    "all, in one": Case(list(range(19)), sequences=1, tokens=19),
}


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that even a few rows and keys overflow."""
    launch = pytest.importorskip("pylon_trainer.kernels.attention.launch")
    tiling = launch.Tiling(rows=16, keys=16, stages=1, warps=4)
    monkeypatch.setattr(launch, "choose_tilings", lambda q: launch.Tilings(tiling, tiling, tiling))


def attend_fused(leaves: list[Tensor], layout: Layout, known: Attended | None = None) -> Tensor:
    """The operator itself, which runs in the interpreter too."""
    q_HKE, k_BJTE, v_BJTE, own_k, own_v = [*leaves, None, None][:5]
    y_KHE, _ = fused_attend_rows(
        q_HKE, k_BJTE, v_BJTE, own_k, own_v, *(known or (None, None)),
        layout.rows_K, layout.first_K, layout.ends_B, layout.until_K, q_HKE.shape[-1] ** -0.5, layout.windowed,
    )  # fmt: skip
    return y_KHE.transpose(0, 1)


def attend_reference(leaves: list[Tensor], layout: Layout) -> Tensor:
    q_HKE, k_BJTE, v_BJTE, *own = leaves
    own_JKE = (own[0], own[1]) if own else None
    return reference.attend_rows(q_HKE, k_BJTE, v_BJTE, layout, own_JKE, q_HKE.shape[-1] ** -0.5)


def with_gradients(y_HKE: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """What came out, and the gradient at every leaf that asks for one, of a loss that is the same in every run."""
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    d_y_HKE = torch.randn(y_HKE.shape, generator=torch.Generator().manual_seed(1)).to(y_HKE)
    return [y_HKE.detach(), *torch.autograd.grad(y_HKE, wanted, d_y_HKE)]


def exact(leaves: list[Tensor]) -> list[Tensor]:
    return [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in leaves]


def assert_close(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert a.dtype == dtype
        error = (a.double() - e).norm() / e.norm().clamp(min=1e-6)
        assert error <= TOLERANCE[dtype], f"relative error {error:.2e}"


def assert_kernels_agree(case: Case, dense: bool, dtype: torch.dtype, device: torch.device) -> None:
    leaves, layout = case.leaves(dense, dtype, device), case.layout(device)
    exact_leaves = exact(leaves)
    actual = with_gradients(attend_fused(leaves, layout), leaves)
    assert_close(actual, with_gradients(attend_reference(exact_leaves, layout), exact_leaves), dtype)


@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize("dense", [False, True], ids=["own", "dense"])
@pytest.mark.parametrize("starts", ["none", "documents", "window"])
@pytest.mark.parametrize("name", ["scattered", "grouped"])
def test_kernels_agree_with_the_reference(device, name, starts, dense) -> None:
    assert_kernels_agree(dataclasses.replace(CASES[name], starts=starts), dense, torch.float32, device)


@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize("dense", [False, True], ids=["own", "dense"])
@pytest.mark.parametrize("name", ["one sequence", "one row", "no row", "all, in one"])
def test_kernels_agree_however_rows_are_spread(device, name, dense) -> None:
    assert_kernels_agree(CASES[name], dense, torch.float16, device)


def assert_known_attention_serves(
    case: Case, dense: bool, dtype: torch.dtype, device: torch.device, backend: SDPBackend
) -> None:
    """Rows whose attention is read off that of all tokens have the gradients of the reference."""
    leaves, layout = case.leaves(dense, dtype, device), case.layout(device)
    q_HKE, k_BJTE, v_BJTE = (leaf.detach() for leaf in leaves[:3])
    q_NHE = torch.randn(case.sequences * case.tokens, case.heads, case.width, device=device).to(dtype)
    q_NHE[layout.rows_K.long()] = q_HKE.transpose(0, 1)
    q_BHTE = q_NHE.unflatten(0, (case.sequences, case.tokens)).transpose(1, 2)
    with sdpa_kernel(backend):
        known = Attended(*fused_attend_all(q_BHTE, k_BJTE, v_BJTE, case.width**-0.5))
    exact_leaves = exact(leaves)
    actual = with_gradients(attend_fused(leaves, layout, known), leaves)
    assert_close(actual, with_gradients(attend_reference(exact_leaves, layout), exact_leaves), dtype)


@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize("dense", [False, True], ids=["own", "dense"])
@pytest.mark.parametrize("name", ["scattered", "grouped", "no row", "all, in one"])
def test_rows_of_known_attention_need_no_other(device, name, dense) -> None:
    assert_known_attention_serves(CASES[name], dense, torch.float16, device, SDPBackend.MATH)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dense", [False, True], ids=["own", "dense"])
@pytest.mark.parametrize("backend", [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 128), (9, 3, 64)])
def test_attention_is_known_whatever_kernel_ran(heads, kv_heads, width, backend, dense, dtype) -> None:
    rows = sorted(torch.randperm(3 * 700)[:467].tolist())
    case = Case(rows, sequences=3, tokens=700, heads=heads, kv_heads=kv_heads, width=width)
    assert_known_attention_serves(case, dense, dtype, torch.device("cuda"), backend)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dense", [False, True], ids=["own", "dense"])
@pytest.mark.parametrize("starts", ["none", "documents", "window"])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 128), (9, 3, 64), (2, 1, 256), (4, 2, 80), (2, 2, 16)])
def test_kernels_at_full_size(heads, kv_heads, width, starts, dense, dtype) -> None:
    """A third of the rows, none of them in the last sequence; twice, to the same bits."""
    device = torch.device("cuda")
    rows = sorted(torch.randperm(2 * 700)[:467].tolist())
    case = Case(rows, starts, sequences=3, tokens=700, heads=heads, kv_heads=kv_heads, width=width)
    assert_kernels_agree(case, dense, dtype, device)
    leaves, layout = case.leaves(dense, dtype, device), case.layout(device)
    first, second = (with_gradients(attend_fused(leaves, layout), leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize("dense", [False, True], ids=["own", "dense"])
def test_compiled_code_calls_the_kernels_for_any_number_of_rows(device, dense) -> None:
    """Without a break in the graph, and without compiling anew."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend_fused, backend=counter, fullgraph=True, dynamic=True)
    for rows in (range(3, 21, 2), range(2, 8), range(7, 21)):
        case = Case(list(rows), sequences=1)
        leaves, layout = case.leaves(dense, torch.float32, device), case.layout(device)
        actual = with_gradients(compiled(leaves, layout), leaves)
        expected = with_gradients(attend_fused(leaves, layout), leaves)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dense", [False, True], ids=["own", "dense"])
@pytest.mark.parametrize("starts", ["none", "documents", "window"])
@pytest.mark.parametrize("name", ["scattered", "grouped", "no row"])
def test_reference_is_masked_attention_seen_at_the_rows(name, starts, dense) -> None:
    case = dataclasses.replace(CASES[name], starts=starts)
    cpu = torch.device("cpu")
    leaves, layout = exact(case.leaves(dense, torch.float32, cpu)), case.layout(cpu)
    q_HKE, k_BJTE, v_BJTE, *own = leaves
    rows_K, t = layout.rows_K.long(), torch.arange(case.tokens)
    if own:
        k_BJTE, v_BJTE = (
            x_BJTE.transpose(1, 2).flatten(0, 1).index_copy(0, rows_K, own_JKE.transpose(0, 1))
            .unflatten(0, (case.sequences, case.tokens)).transpose(1, 2)
            for x_BJTE, own_JKE in zip((k_BJTE, v_BJTE), own, strict=True)
        )  # fmt: skip
    q_NHE = torch.zeros(case.sequences * case.tokens, case.heads, case.width, dtype=torch.float64)
    q_BTHE = q_NHE.index_copy(0, rows_K, q_HKE.transpose(0, 1)).unflatten(0, (case.sequences, case.tokens))
    mask_BTT = (t <= t[:, None]) & (t >= case.starts_BT(cpu)[:, :, None])
    y_BHTE = F.scaled_dot_product_attention(
        q_BTHE.transpose(1, 2), k_BJTE, v_BJTE, attn_mask=mask_BTT.unsqueeze(1), enable_gqa=True
    )
    y_HKE = y_BHTE.transpose(1, 2).flatten(0, 1)[rows_K].transpose(0, 1)
    expected = with_gradients(y_HKE, leaves)
    for a, e in zip(with_gradients(attend_reference(leaves, layout), leaves), expected, strict=True):
        torch.testing.assert_close(a, e)


def test_autocast_runs_the_products_in_its_type(anywhere) -> None:
    """Queries and keys that a norm made float32 beside values in half precision, as some models have them."""
    case = CASES["scattered"]
    leaves, layout = case.leaves(False, torch.float32, anywhere), case.layout(anywhere)
    q_HKE, k_BJTE, v_BJTE, own_k, own_v = leaves
    with torch.autocast(anywhere.type, dtype=torch.bfloat16):
        y_HKE = attention.attend_rows(q_HKE, k_BJTE, v_BJTE.bfloat16(), layout, (own_k, own_v.bfloat16()))
    assert y_HKE.dtype == torch.bfloat16
    exact_leaves = exact(leaves)
    expected = with_gradients(attend_reference(exact_leaves, layout), exact_leaves)
    for a, e in zip(with_gradients(y_HKE, leaves), expected, strict=True):
        assert (a.double() - e).norm() <= TOLERANCE[torch.bfloat16] * e.norm()


@pytest.mark.parametrize(
    ("queries", "keys", "complaint"),
    [
        ((2, 5, 16), (1, 2, 8, 8), r"queries \(2, 5, 16\), keys \(1, 2, 8, 8\)"),
        ((3, 5, 16), (1, 2, 8, 16), "H a multiple of J"),
        ((2, 5, 512), (1, 2, 8, 512), "512 wide; give at most 256"),
    ],
)
def test_bad_input_is_named(queries, keys, complaint) -> None:
    layout = Case(list(range(5)), sequences=1, tokens=8).layout(torch.device("cpu"))
    with pytest.raises(ValueError, match=complaint):
        attention.attend_rows(torch.zeros(queries), torch.zeros(keys), torch.zeros(keys), layout)
