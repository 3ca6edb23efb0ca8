from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pylon_trainer.kernels import bucket as bucket_kernel
from pylon_trainer.kernels.bucket import reference

SPECIAL = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1.0, -1.0, math.nan, 0.0])


def scores(kind: str, rows: int) -> Tensor:
    return {
        "normal": torch.randn(rows),
        "equal": torch.zeros(rows),
        "tied": torch.randint(-2, 3, (rows,)).float() / 4,
        "special": SPECIAL.repeat(rows // len(SPECIAL) + 1)[:rows],
    }[kind]


@pytest.mark.parametrize("kind", ["normal", "equal", "tied", "special"])
@pytest.mark.parametrize(("rows", "ends"), [(1, (1,)), (40, (10, 20, 33)), (37, (37,)), (9, ())])
def test_kernel_agrees_with_a_sort(device, kind, rows, ends, monkeypatch) -> None:
    linear = pytest.importorskip("pylon_trainer.kernels.bucket.triton")
    monkeypatch.setattr(linear, "BLOCK", 16)
    scores_N = scores(kind, rows)
    actual, expected = linear.bucket(scores_N.to(device), ends), reference.bucket(scores_N, ends)
    assert actual.bucket_N.tolist() == expected.bucket_N.tolist()
    torch.testing.assert_close(actual.thresholds_B.cpu(), expected.thresholds_B, equal_nan=True, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["normal", "equal", "tied", "special"])
def test_kernel_on_a_million_scores(kind) -> None:
    scores_N, ends = scores(kind, 1_000_003), (250_000, 500_001, 750_002)
    actual, expected = bucket_kernel.bucket(scores_N.cuda(), ends), reference.bucket(scores_N, ends)
    assert torch.equal(actual.bucket_N.cpu(), expected.bucket_N)


def test_earlier_of_equal_scores_ranks_higher() -> None:
    buckets = bucket_kernel.bucket(torch.tensor([1.0, 3.0, 1.0, 1.0]), (1, 3))
    assert buckets.bucket_N.tolist() == [1, 0, 1, 2]
    assert buckets.thresholds_B.tolist() == [3.0, 1.0]


@pytest.mark.parametrize("ends", [(0,), (5,), (2, 2), (3, 1)])
def test_bad_ends_are_named(ends) -> None:
    with pytest.raises(ValueError, match="must rise within 1 to 4"):
        bucket_kernel.bucket(torch.zeros(4), ends)


def test_bad_type_is_named() -> None:
    with pytest.raises(ValueError, match="float64"):
        bucket_kernel.bucket(torch.zeros(4, dtype=torch.float64), (1,))
