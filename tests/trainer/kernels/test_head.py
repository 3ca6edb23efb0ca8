from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pylon_trainer.kernels import head
from pylon_trainer.kernels.head import gradients, reference
from pylon_trainer.step import IGNORED

TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def inputs(
    rows: int, vocab: int, hidden: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head weight (both ask for gradients) and labels, the first of them ignored."""
    hidden_NH = torch.randn(rows, hidden, device=device).to(dtype).requires_grad_()
    weight_VH = (torch.randn(vocab, hidden, device=device) * 3 * hidden**-0.5).to(dtype).requires_grad_()
    labels_N = torch.randint(vocab, (rows,), device=device)
    labels_N[0] = IGNORED
    return hidden_NH, weight_VH, labels_N


def assert_scores_close(actual, expected, tolerance: float = 1e-4) -> None:
    for name in expected.__slots__:
        torch.testing.assert_close(
            getattr(actual, name),
            getattr(expected, name),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_gradients_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9)
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "vocab", "hidden"), [(5, 7, 8), (19, 70, 24), (17, 65, 17)])
def test_kernel_agrees_with_the_reference(device, dtype, rows, vocab, hidden) -> None:
    """Rows, vocabulary and width that are multiples of nothing; the copy engine cannot read 17 columns as they are."""
    fused = pytest.importorskip("pylon_trainer.kernels.head.triton")
    tiling = fused.Tiling(rows=16, columns=32, depth=16, run=2, group=2, stages=1, warps=4)
    hidden_NH, weight_VH, labels_N = (tensor.detach() for tensor in inputs(rows, vocab, hidden, dtype, device))
    actual = fused.score_tiled(hidden_NH, weight_VH, labels_N, tiling)
    assert_scores_close(actual, reference.score(hidden_NH.float(), weight_VH.float(), labels_N))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_kernel_counts_rows_that_are_not_finite(device, value) -> None:
    fused = pytest.importorskip("pylon_trainer.kernels.head.triton")
    tiling = fused.Tiling(rows=16, columns=32, depth=16, run=2, group=2, stages=1, warps=4)
    hidden_NH, weight_VH, labels_N = (tensor.detach() for tensor in inputs(20, 70, 16, torch.float32, device))
    hidden_NH[[0, 7], 3] = value
    assert fused.score_tiled(hidden_NH, weight_VH, labels_N, tiling).nonfinite_rows.item() == 1  # row 0 has no label


def test_kernel_of_the_logit_gradient_agrees_with_the_reference(device, monkeypatch) -> None:
    fused = pytest.importorskip("pylon_trainer.kernels.head.triton")
    monkeypatch.setattr(fused, "GRADIENT_BLOCK", 128)
    logits_KC = torch.randn(4, 300, device=device)[:, :299]
    logsumexp_K = torch.tensor([6.0, 6.0, float("inf"), 6.0], device=device)
    labels_K = torch.tensor([0, 298, IGNORED, 299], device=device)
    weights_K = torch.tensor([1.0, 0.5, 0.0, 2.0], device=device)
    actual, expected = logits_KC.clone(), logits_KC.clone()
    fused.logit_gradient_(actual, logsumexp_K, labels_K, weights_K)
    reference.logit_gradient_(expected, logsumexp_K, labels_K, weights_K)
    torch.testing.assert_close(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocab", "hidden"), [(300, 1000, 64), (257, 50257, 576), (70, 300, 33)])
def test_scores_at_full_size(dtype, rows, vocab, hidden) -> None:
    hidden_NH, weight_VH, labels_N = inputs(rows, vocab, hidden, dtype, torch.device("cuda"))
    first, second = head.score(hidden_NH, weight_VH, labels_N), head.score(hidden_NH, weight_VH, labels_N)
    assert_scores_close(first, reference.score(hidden_NH.detach().float(), weight_VH.detach().float(), labels_N))
    assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in first.__slots__)


@pytest.mark.gpu
def test_scoring_allocates_no_logits() -> None:
    hidden_NH, weight_VH, labels_N = inputs(4096, 50000, 256, torch.bfloat16, torch.device("cuda"))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    head.score(hidden_NH, weight_VH, labels_N)
    logits_bytes = 4096 * 50000 * 2
    assert torch.cuda.max_memory_allocated() - before < logits_bytes / 50


@pytest.mark.parametrize("scored", [False, True], ids=["unscored", "scored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [[5, 2, 11], [4], [3, 3, 1], [0, 6], [0], []], ids=str)
def test_selected_loss_and_gradients(anywhere, dtype, rows, scored, monkeypatch) -> None:
    """Any order, one row twice, an ignored row among them, only ignored rows, none; in chunks of the vocabulary."""
    monkeypatch.setattr(gradients, "COLUMN_CHUNK_BYTES", {"cpu": 1, "cuda": 1})
    hidden_NH, weight_VH, labels_N = inputs(12, 600, 40, dtype, anywhere)
    rows_K = torch.tensor(rows, dtype=torch.int64, device=anywhere)
    weights_K = torch.rand(len(rows), device=anywhere) + 0.5
    scores = head.score(hidden_NH, weight_VH, labels_N) if scored else None

    loss = head.selected_cross_entropy(hidden_NH, weight_VH, labels_N, rows_K, weights_K, scores)
    d_hidden, d_weight = torch.autograd.grad(loss * 2, (hidden_NH, weight_VH))

    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden_NH, weight_VH)]
    expected = reference.selected_cross_entropy(*exact, labels_N, rows_K, weights_K)
    expected_d_hidden, expected_d_weight = torch.autograd.grad(expected * 2, exact)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=TOLERANCE[dtype], abs=1e-6)
    assert_gradients_close(d_hidden, expected_d_hidden, dtype)
    assert_gradients_close(d_weight, expected_d_weight, dtype)
    assert not d_hidden[[row for row in range(12) if row not in rows]].any()


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 8 rows, or of 64 columns."""
    monkeypatch.setattr(gradients, "ROW_CHUNK_BYTES", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(gradients, "COLUMN_CHUNK_BYTES", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(gradients, "CHUNK_MULTIPLE", 8)


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("known", [False, True], ids=["all at once", "scored before"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocab", "hidden"), [(21, 193, 40), (8, 64, 16), (1, 7, 3), (0, 130, 8)])
def test_loss_and_gradients_agree_with_cross_entropy(anywhere, dtype, rows, vocab, hidden, known) -> None:
    """Weights, ignored rows, sizes that are multiples of nothing, one row, none."""
    hidden_KH = torch.randn(rows, hidden, device=anywhere).to(dtype)
    weight_VH = (torch.randn(vocab, hidden, device=anywhere) * 3 * hidden**-0.5).to(dtype)
    labels_K = torch.randint(vocab, (rows,), device=anywhere)
    labels_K[1::3] = IGNORED
    weights_K = torch.rand(rows, device=anywhere) + 0.5
    whole = head.loss_gradients(hidden_KH, weight_VH, labels_K, weights_K, wants_scores=True)
    d_hidden_KH, d_weight_VH, scores = whole.d_hidden_KH, whole.d_weight_VH, head.score(hidden_KH, weight_VH, labels_K)
    if known:
        d_hidden_KH, d_weight_VH = head.known_gradients(hidden_KH, weight_VH, labels_K, weights_K, scores.logsumexp_N)

    exact_hidden, exact_weight = hidden_KH.double().requires_grad_(), weight_VH.double().requires_grad_()
    losses_K = F.cross_entropy(exact_hidden @ exact_weight.T, labels_K, ignore_index=IGNORED, reduction="none")
    (losses_K @ weights_K.double()).backward()
    torch.testing.assert_close(whole.losses_K.double(), losses_K.detach(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert d_hidden_KH.dtype == d_weight_VH.dtype == torch.float32
    assert_gradients_close(d_hidden_KH, exact_hidden.grad, dtype)
    assert_gradients_close(d_weight_VH, exact_weight.grad, dtype)
    assert whole.nonfinite_rows.item() == 0
    assert_scores_close(whole.scores, scores, TOLERANCE[dtype])


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("logit", [float("nan"), float("inf"), float("-inf")])
def test_a_logit_that_is_not_finite_is_counted_and_spreads(anywhere, logit) -> None:
    hidden_KH, weight_VH = torch.rand(20, 8, device=anywhere), torch.rand(70, 8, device=anywhere)
    weight_VH[65] = logit
    labels_K = torch.arange(20, device=anywhere)
    labels_K[3] = IGNORED
    result = head.loss_gradients(hidden_KH, weight_VH, labels_K, torch.ones(20, device=anywhere))
    assert result.nonfinite_rows.item() == 19
    assert result.d_hidden_KH[torch.arange(20) != 3].isnan().all()
    assert result.d_weight_VH.isnan().all()
    assert head.poison(result.nonfinite_rows).isnan()
    assert head.poison(torch.zeros((), dtype=torch.int32)) == 1


def test_scores_in_chunks_are_those_of_all_rows(anywhere, monkeypatch) -> None:
    hidden_NH, weight_VH, labels_N = (tensor.detach() for tensor in inputs(20, 70, 8, torch.float32, anywhere))
    hidden_NH[5, 0] = float("nan")
    monkeypatch.setattr(gradients, "ROW_CHUNK_BYTES", {"cpu": 1})
    monkeypatch.setattr(gradients, "CHUNK_MULTIPLE", 8)
    expected = reference.score(hidden_NH, weight_VH, labels_N)
    actual, losses = head.score(hidden_NH, weight_VH, labels_N), head.cross_entropy(hidden_NH, weight_VH, labels_N)
    finite_N = torch.arange(20, device=anywhere) != 5
    assert_scores_close(actual.take(finite_N.nonzero()[:, 0]), expected.take(finite_N.nonzero()[:, 0]), 1e-4)
    torch.testing.assert_close(losses.loss_N[finite_N], expected.loss_N[finite_N])
    torch.testing.assert_close(losses.logsumexp_N[finite_N], expected.logsumexp_N[finite_N])
    assert actual.nonfinite_rows.item() == losses.nonfinite_rows.item() == 1


@pytest.mark.gpu
@pytest.mark.parametrize("known", [False, True], ids=["all at once", "scored before"])
def test_gradients_allocate_a_chunk_and_no_more(known, monkeypatch) -> None:
    rows, vocab, hidden, chunk = 8192, 50257, 256, 64 * 2**20
    monkeypatch.setattr(gradients, "ROW_CHUNK_BYTES", {"cuda": chunk})
    monkeypatch.setattr(gradients, "COLUMN_CHUNK_BYTES", {"cuda": chunk})
    hidden_KH, weight_VH, labels_K = (
        tensor.detach() for tensor in inputs(rows, vocab, hidden, torch.bfloat16, torch.device("cuda"))
    )
    weights_K = torch.ones(rows, device="cuda")
    logsumexp_K = head.score(hidden_KH, weight_VH, labels_K).logsumexp_N
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if known:
        kept: object = head.known_gradients(hidden_KH, weight_VH, labels_K, weights_K, logsumexp_K)
    else:
        kept = head.loss_gradients(hidden_KH, weight_VH, labels_K, weights_K)
    peak = torch.cuda.max_memory_allocated() - before
    results_bytes = 4 * hidden * (rows + vocab)
    assert kept
    # Beside results and a chunk: a padded weight and what cuBLAS works in.
    assert peak < results_bytes + 1.2 * chunk + 2 * hidden * vocab + 64 * 2**20
    assert peak < 2 * rows * vocab / 2


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "vocab", "hidden"), [(1000, 50257, 256), (700, 32000, 64)])
def test_loss_and_gradients_at_full_size(rows, vocab, hidden, monkeypatch) -> None:
    """In bfloat16 with several chunks, against float64; the same bits twice."""
    monkeypatch.setattr(gradients, "ROW_CHUNK_BYTES", {"cuda": 32 * 2**20})
    hidden_KH, weight_VH, labels_K = inputs(rows, vocab, hidden, torch.bfloat16, torch.device("cuda"))
    weights_K = torch.rand(rows, device="cuda") + 0.5
    first, second = (head.loss_gradients(hidden_KH, weight_VH, labels_K, weights_K) for _ in range(2))
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden_KH, weight_VH)]
    F.cross_entropy(exact[0] @ exact[1].T, labels_K, ignore_index=IGNORED, reduction="none").mul(
        weights_K
    ).sum().backward()
    assert_gradients_close(first.d_hidden_KH, exact[0].grad, torch.bfloat16)
    assert_gradients_close(first.d_weight_VH, exact[1].grad, torch.bfloat16)
    assert all(torch.equal(one, other) for one, other in zip(first[:4], second[:4], strict=True))


def test_frozen_weight_gets_no_gradient(anywhere) -> None:
    hidden_NH, weight_VH, labels_N = inputs(4, 30, 8, torch.float32, anywhere)
    weight_VH.requires_grad_(False)
    head.selected_cross_entropy(
        hidden_NH, weight_VH, labels_N, torch.tensor([1, 2], device=anywhere), torch.ones(2, device=anywhere)
    ).backward()
    assert weight_VH.grad is None
    assert hidden_NH.grad is not None
    assert hidden_NH.grad[1:3].any()


def test_autocast_runs_the_products_in_its_type(anywhere) -> None:
    hidden_NH, weight_VH, labels_N = inputs(6, 50, 16, torch.float32, anywhere)
    rows_K, weights_K = torch.tensor([1, 4], device=anywhere), torch.ones(2, device=anywhere)
    with torch.autocast(anywhere.type, dtype=torch.bfloat16):
        loss = head.selected_cross_entropy(hidden_NH, weight_VH, labels_N, rows_K, weights_K)
    loss.backward()
    exact = [tensor.detach().clone().requires_grad_() for tensor in (hidden_NH, weight_VH)]
    reference.selected_cross_entropy(*exact, labels_N, rows_K, weights_K).backward()
    for actual, expected in zip((hidden_NH, weight_VH), exact, strict=True):
        assert actual.grad is not None
        assert actual.grad.dtype == torch.float32
        assert_gradients_close(actual.grad, expected.grad, torch.bfloat16)


@pytest.mark.parametrize(
    ("hidden", "weight", "labels", "complaint"),
    [
        ((3, 4), (5, 6), (3,), r"\(3, 4\) and weight \(5, 6\)"),
        ((3, 4), (5, 4), (2,), r"labels \(2,\)"),
    ],
)
def test_bad_shapes_are_named(hidden, weight, labels, complaint) -> None:
    with pytest.raises(ValueError, match=complaint):
        head.score(torch.zeros(hidden), torch.zeros(weight), torch.zeros(labels, dtype=torch.int64))


def test_mixed_types_are_named() -> None:
    with pytest.raises(ValueError, match=r"bfloat16, weight torch\.float32; give both"):
        head.score(torch.zeros(1, 4, dtype=torch.bfloat16), torch.zeros(5, 4), torch.zeros(1, dtype=torch.int64))
