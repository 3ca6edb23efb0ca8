"""Selections have the size, the probabilities and the weights that make a sum over them unbiased."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pylon_trainer.gating.selection import SCORE_FLOOR, inclusion_probabilities, sample, top


def scores_of(count: int, seed: int = 0) -> Tensor:
    """Scores as gradient norms are: many small, a few large."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) ** 4


def everyone(count: int) -> Tensor:
    return torch.ones(count, dtype=torch.bool)


@settings(max_examples=200, deadline=None)
@given(
    scores=st.lists(st.floats(0, 1e4, width=32), min_size=1, max_size=40),
    ignored=st.sets(st.integers(0, 39)),
    share=st.floats(0.01, 1),
)
def test_probabilities_are_proportional_up_to_one_and_add_up(
    scores: list[float], ignored: set[int], share: float
) -> None:
    scores_N = torch.tensor(scores)
    labelled_N = torch.tensor([place not in ignored for place in range(len(scores))])
    rows = max(1, round(share * len(scores)))
    p_N = inclusion_probabilities(scores_N, labelled_N, rows)

    assert ((p_N >= 0) & (p_N <= 1)).all()
    assert (p_N[~labelled_N] == 0).all()
    assert p_N.sum().item() == pytest.approx(min(rows, int(labelled_N.sum())), abs=1e-6)
    mean = scores_N[labelled_N].double().mean() if labelled_N.any() else torch.tensor(0.0)
    floored_N = scores_N.double().clamp_min(SCORE_FLOOR * mean) + 1e-9
    free_N = labelled_N & (p_N < 1 - 1e-9)
    if free_N.sum() > 1:
        ratios_N = p_N[free_N] / floored_N[free_N]
        torch.testing.assert_close(ratios_N, ratios_N[:1].expand_as(ratios_N), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [1, 7, 32, 63, 64])
def test_sampling_draws_exactly_the_rows_asked_for_each_once(rows: int) -> None:
    for start in (0.0, 0.3, 0.999999):
        rows_K, weights_K = sample(scores_of(64), everyone(64), rows=rows, start=start)
        assert len(rows_K) == rows
        assert len(rows_K.unique()) == rows
        assert (weights_K >= 1).all()


def test_each_token_is_drawn_as_often_as_its_probability_says() -> None:
    scores_N, rows, starts = scores_of(50), 20, 2000
    counts_N = torch.zeros(50)
    for index in range(starts):  # the start is all that is random: an even grid of starts stands for all of them
        counts_N[sample(scores_N, everyone(50), rows=rows, start=(index + 0.5) / starts).rows_K] += 1
    expected_N = inclusion_probabilities(scores_N, everyone(50), rows)
    torch.testing.assert_close((counts_N / starts).double(), expected_N, atol=1.5 / starts, rtol=0)


def test_weighted_sums_are_unbiased_for_random_starts() -> None:
    scores_N, draws, rows = scores_of(80), 4000, 16
    values_N = torch.randn(80, generator=torch.Generator().manual_seed(5))
    starts = torch.rand(draws, generator=torch.Generator().manual_seed(6)).tolist()
    sums = []
    for start in starts:
        rows_K, weights_K = sample(scores_N, everyone(80), rows=rows, start=start)
        sums.append((values_N[rows_K] * weights_K).sum())
    estimates = torch.stack(sums)
    error = (estimates.mean() - values_N.sum()).abs()
    assert error < 4 * estimates.std() / draws**0.5  # a false alarm once in 16000 seeds, and the seed is fixed
    assert estimates.std() > 0.1  # the test would notice a bias of this size


def test_tokens_without_label_are_never_drawn_with_weight() -> None:
    labelled_N = torch.arange(40) % 4 == 0
    for rows, weighted in ((5, 5), (10, 10), (25, 10), (40, 10)):
        rows_K, weights_K = sample(scores_of(40), labelled_N, rows=rows, start=0.4)
        assert len(rows_K) == rows
        assert int((weights_K > 0).sum()) == weighted
        assert labelled_N[rows_K[weights_K > 0]].all()
        top_K, top_weights_K = top(scores_of(40), labelled_N, rows=rows)
        assert labelled_N[top_K[top_weights_K > 0]].all()
        assert int(top_weights_K.sum()) == weighted


def test_all_rows_have_weight_one() -> None:
    rows_K, weights_K = sample(scores_of(33), everyone(33), rows=33, start=0.7)
    assert sorted(rows_K.tolist()) == list(range(33))
    torch.testing.assert_close(weights_K, torch.ones(33))


def test_weights_are_bounded_by_the_floor() -> None:
    scores_N = torch.full((1000,), 1e-6)
    scores_N[:10] = 1.0
    _, weights_K = sample(scores_N, everyone(1000), rows=100, start=0.5)
    assert weights_K.max() <= (1000 / 100) / SCORE_FLOOR


def test_top_takes_the_highest_scores_at_weight_one() -> None:
    rows_K, weights_K = top(torch.tensor([0.1, 3.0, 0.2, 2.0]), everyone(4), rows=2)
    assert sorted(rows_K.tolist()) == [1, 3]
    assert weights_K.tolist() == [1, 1]
