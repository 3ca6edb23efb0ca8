from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch

from pylon_trainer.kernels import score as score_kernel
from pylon_trainer.kernels.score import Scores, reference
from pylon_trainer.step import IGNORED

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCORES = [field.name for field in fields(Scores)]


def assert_close(actual: Scores, expected: Scores, absolute: float = 2e-5) -> None:
    for name in SCORES:
        torch.testing.assert_close(
            getattr(actual, name),
            getattr(expected, name),
            rtol=1e-5,
            atol=absolute,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def labels(rows: int, vocab: int, device: torch.device) -> torch.Tensor:
    """Random labels, the first of them ignored."""
    labels_N = torch.randint(vocab, (rows,), device=device)
    labels_N[0] = IGNORED
    return labels_N


@pytest.fixture
def fused(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    """The kernel with few lanes, so that small vocabularies span several tiles."""
    triton = pytest.importorskip("pylon_trainer.kernels.score.triton")
    if device.type == "cpu":
        monkeypatch.setattr(triton, "LANES", 4)
    return triton.score


@pytest.mark.parametrize(
    ("rows", "vocab", "offset", "dtype"),
    [
        (3, 1, 0, torch.float32),
        (3, 2, 1, torch.float16),
        (2, 128, 0, torch.bfloat16),
        (3, 131, 0, torch.float16),
        (3, 301, 3, torch.float32),
        (3, 301, 3, torch.bfloat16),
    ],
)
def test_kernel_agrees_with_the_reference(fused, device, rows, vocab, offset, dtype) -> None:
    """Vocabularies smaller and larger than a tile, whole and odd; rows that begin anywhere."""
    logits_NV = (torch.randn(rows, vocab + offset, device=device) * 3).to(dtype)[:, offset:]
    labels_N = labels(rows, vocab, device)
    assert_close(fused(logits_NV, labels_N), reference.score(logits_NV, labels_N))


def test_kernel_keeps_its_precision_on_large_logits(fused, device) -> None:
    logits_NV = torch.randn(3, 200, device=device, dtype=torch.float32) * 2 + 1000
    labels_N = labels(3, 200, device)
    expected = reference.score(logits_NV - 1000, labels_N)
    actual = fused(logits_NV, labels_N)
    torch.testing.assert_close(actual.entropy_N, expected.entropy_N, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(actual.loss_N, expected.loss_N, rtol=1e-3, atol=1e-3)


def test_kernel_counts_rows_with_nan_or_infinity(fused, device) -> None:
    logits_NV = torch.randn(6, 140, device=device)
    logits_NV[0, 0], logits_NV[1, 139], logits_NV[2, 5], logits_NV[3, 7] = math.nan, math.nan, math.inf, -math.inf
    labels_N = torch.tensor([IGNORED, 1, 2, 3, 4, 5], device=device)
    actual, expected = fused(logits_NV, labels_N), reference.score(logits_NV, labels_N)
    assert actual.nonfinite_rows.item() == expected.nonfinite_rows.item() == 3
    torch.testing.assert_close(actual.loss_N[4:], expected.loss_N[4:])


def test_gradient_norm_of_a_learnt_token_is_never_below_its_miss(fused, device) -> None:
    """Where the label holds almost all mass, sums of squares cancel; the norm must still follow 1 - p."""
    gaps = torch.tensor([4.0, 8.0, 12.0, 16.0], device=device)
    logits_NV = torch.zeros(4, 3, device=device)
    logits_NV[:, 1] = gaps
    norms = fused(logits_NV, torch.ones(4, dtype=torch.int64, device=device)).gradient_norm_N
    miss = 2 * torch.exp(-gaps.double()) / (1 + 2 * torch.exp(-gaps.double()))
    exact = torch.sqrt(miss**2 * 1.5).float()
    assert ((norms >= 0.8 * exact) & (norms <= 1.2 * exact)).all(), (norms, exact)


def test_no_rows(fused, device) -> None:
    scores = fused(torch.zeros(0, 5, device=device), torch.zeros(0, dtype=torch.int64, device=device))
    assert scores.loss_N.shape == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), [(65, 50257), (9, 200005), (130, 49152)])
def test_kernel_is_right_and_repeatable_at_full_size(dtype, rows, vocab) -> None:
    logits_NV = (torch.randn(rows, vocab, device="cuda") * 3).to(dtype)
    labels_N = labels(rows, vocab, torch.device("cuda"))
    first, second = score_kernel.score(logits_NV, labels_N), score_kernel.score(logits_NV, labels_N)
    assert_close(first, reference.score(logits_NV, labels_N), absolute=1e-4)
    assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in SCORES)


def test_reference_of_a_distribution_known_by_hand() -> None:
    logits_NV = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]))
    scores = score_kernel.score(logits_NV, torch.tensor([1, IGNORED]))
    expected = {
        "entropy_N": 1.5 * math.log(2),
        "margin_N": 0.25,
        "loss_N": math.log(4),
        "confidence_N": 0.5,
        "logsumexp_N": 0.0,
        "gradient_norm_N": math.sqrt(0.25 + 0.5625 + 0.0625),
    }
    for name, value in expected.items():
        assert getattr(scores, name).tolist() == pytest.approx([value, 0.0], abs=1e-6), name


@pytest.mark.parametrize(
    ("logits", "labels_", "complaint"),
    [
        (torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64), r"\(3, 4\) and labels \(2,\)"),
        (torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64), r"must be \(N, V\)"),
        (torch.zeros(2, 4, dtype=torch.float64), torch.zeros(2, dtype=torch.int64), "float64; give float32"),
    ],
)
def test_bad_input_is_named(logits, labels_, complaint) -> None:
    with pytest.raises(ValueError, match=complaint):
        score_kernel.score(logits, labels_)
