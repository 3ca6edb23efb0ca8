"""Histograms of difficulty count what a plain loop over the tokens counts, and never what is no token."""

from __future__ import annotations

import math

import pytest
import torch

from pylon_api.run import Histogram
from pylon_trainer.gating.difficulty import ENTROPY_BOUNDS, GRADIENT_NORM_BOUNDS, SHAPE, describe, measure


def counted(values: list[float], bounds: tuple[float, ...]) -> list[int]:
    lower = (-math.inf, *bounds)
    upper = (*bounds, math.inf)
    return [sum(low < value <= high for value in values) for low, high in zip(lower, upper, strict=True)]


def test_counts_are_those_of_a_loop_and_add_up_over_micro_batches() -> None:
    draws = torch.Generator().manual_seed(0)
    norms_N, entropies_N = torch.rand(300, generator=draws) * 1.42, torch.rand(300, generator=draws) * 13
    labelled_N = torch.rand(300, generator=draws) < 0.7
    halves = [measure(norms_N[part], entropies_N[part], labelled_N[part]) for part in (slice(0, 111), slice(111, None))]
    report = describe(sum(halves, torch.zeros(SHAPE, dtype=torch.float64)).tolist())
    for histogram, values_N, bounds in (
        (report.gradient_norm, norms_N, GRADIENT_NORM_BOUNDS),
        (report.entropy, entropies_N, ENTROPY_BOUNDS),
    ):
        values = values_N[labelled_N].tolist()
        assert histogram.bounds == list(bounds)
        assert histogram.counts == counted(values, bounds)
        assert histogram.counts[-1] > 0
        assert histogram.sum == pytest.approx(sum(values))


def test_a_value_on_a_bound_is_in_the_bin_below_it() -> None:
    report = describe(measure(torch.tensor([0.1]), torch.tensor([12.0]), torch.tensor([True])).tolist())
    assert report.gradient_norm.counts.index(1) == 0
    assert report.entropy.counts.index(1) == len(ENTROPY_BOUNDS) - 1


def test_tokens_without_a_label_or_a_finite_score_are_left_out() -> None:
    nothing = Histogram(bounds=list(GRADIENT_NORM_BOUNDS), counts=[0] * (len(GRADIENT_NORM_BOUNDS) + 1), sum=0)
    values_N = torch.tensor([math.nan, math.inf, 0.5])
    report = describe(measure(values_N, values_N, torch.tensor([True, True, False])).tolist())
    assert report.gradient_norm == nothing
    assert sum(report.entropy.counts) == report.entropy.sum == 0


def test_counting_reads_no_value_on_the_host() -> None:
    """Tensors without data: whatever looked at a value would fail."""
    scores_N = torch.empty(9, device="meta")
    assert measure(scores_N, scores_N, torch.empty(9, device="meta", dtype=torch.bool)).shape == SHAPE
