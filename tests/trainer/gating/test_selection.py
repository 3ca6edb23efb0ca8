"""Selections have the size, the probabilities and the weights that make a sum over them unbiased."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pylon_api.training import GatingSpec
from pylon_trainer.gating.selection import SCORE_FLOOR, Selection, build_rule, proportional, select

UNBIASED = {
    "sampled": GatingSpec(selection="Sampled"),
    "stratified": GatingSpec(selection="Stratified"),
    "two strata": GatingSpec(selection="Stratified", strata=2),
    "sequence aware": GatingSpec(selection="SequenceAware"),
    "fixed quota": GatingSpec(selection="SequenceAware", sequence_share=1),
}
RULES = {**UNBIASED, "top": GatingSpec(selection="Top")}
each_rule = pytest.mark.parametrize("gating", RULES.values(), ids=RULES)
each_unbiased_rule = pytest.mark.parametrize("gating", UNBIASED.values(), ids=UNBIASED)


def scores_of(sequences: int, length: int, seed: int = 0) -> Tensor:
    """Scores as gradient norms are: many small, a few large; and some sequences easier than others."""
    scores_BT = torch.rand(sequences, length, generator=torch.Generator().manual_seed(seed)) ** 4
    return scores_BT * torch.linspace(0.2, 1, sequences)[:, None]


def everyone(scores_BT: Tensor) -> Tensor:
    return torch.ones_like(scores_BT, dtype=torch.bool)


def probabilities(gating: GatingSpec, scores_BT: Tensor, labelled_BT: Tensor, rows: int) -> Tensor:
    return build_rule(gating)(scores_BT, labelled_BT, torch.tensor([rows]))[0]


def selected(gating: GatingSpec, scores_BT: Tensor, labelled_BT: Tensor, rows: int, start: float = 0.4) -> Selection:
    selection = select(gating, scores_BT, labelled_BT, rows=rows, start=start)
    assert len(selection.rows_K) == len(selection.weights_K) == rows
    assert (selection.rows_K.diff() > 0).all(), "distinct and rising"
    return selection


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
    p_N = proportional(scores_N[None], labelled_N[None], torch.tensor([rows]))[0]

    assert ((p_N >= 0) & (p_N <= 1)).all()
    assert (p_N[~labelled_N] == 0).all()
    assert p_N.sum().item() == pytest.approx(min(rows, int(labelled_N.sum())), abs=1e-6)
    mean = scores_N[labelled_N].double().mean() if labelled_N.any() else torch.tensor(0.0)
    floored_N = scores_N.double().clamp_min(SCORE_FLOOR * mean) + 1e-9
    free_N = labelled_N & (p_N < 1 - 1e-9)
    if free_N.sum() > 1:
        ratios_N = p_N[free_N] / floored_N[free_N]
        torch.testing.assert_close(ratios_N, ratios_N[:1].expand_as(ratios_N), rtol=1e-6, atol=0)


@settings(max_examples=200, deadline=None)
@given(
    gating=st.sampled_from(list(RULES.values())),
    seed=st.integers(0, 10**6),
    sequences=st.integers(1, 5),
    length=st.integers(1, 12),
    labels=st.floats(0, 1),
    levels=st.sampled_from([1, 2, 1000]),  # of score: all equal, many ties, hardly any
    share=st.floats(0.01, 1),
)
def test_any_rule_hands_out_just_what_there_is(
    gating: GatingSpec, seed: int, sequences: int, length: int, labels: float, levels: int, share: float
) -> None:
    draws = torch.Generator().manual_seed(seed)
    scores_BT = torch.randint(levels, (sequences, length), generator=draws).float()
    labelled_BT = torch.rand(sequences, length, generator=draws) < labels
    rows = max(1, round(share * sequences * length))

    p_N = probabilities(gating, scores_BT, labelled_BT, rows)
    given_out = min(rows, int(labelled_BT.sum()))
    assert ((p_N >= 0) & (p_N <= 1 + 1e-9)).all()
    assert (p_N[~labelled_BT.flatten()] == 0).all()
    assert p_N.sum().item() == pytest.approx(given_out, abs=1e-6)

    rows_K, weights_K = selected(gating, scores_BT, labelled_BT, rows, start=float(torch.rand((), generator=draws)))
    assert int((weights_K > 0).sum()) == given_out
    assert labelled_BT.flatten()[rows_K[weights_K > 0]].all()
    assert (weights_K[weights_K > 0] >= 1 - 1e-6).all()
    torch.testing.assert_close(weights_K[weights_K > 0], p_N[rows_K[weights_K > 0]].reciprocal().float())


@each_unbiased_rule
def test_each_token_is_drawn_as_often_as_its_probability_says(gating: GatingSpec) -> None:
    scores_BT, rows, starts = scores_of(5, 10), 20, 500
    counts_N = torch.zeros(50)
    for index in range(starts):  # the start is all that is random: an even grid of starts stands for all of them
        counts_N[selected(gating, scores_BT, everyone(scores_BT), rows, (index + 0.5) / starts).rows_K] += 1
    expected_N = probabilities(gating, scores_BT, everyone(scores_BT), rows)
    torch.testing.assert_close((counts_N / starts).double(), expected_N, atol=1.5 / starts, rtol=0)


@each_unbiased_rule
def test_weighted_sums_are_unbiased_for_random_starts(gating: GatingSpec) -> None:
    scores_BT, draws, rows = scores_of(8, 10), 1000, 16
    values_N = torch.randn(80, generator=torch.Generator().manual_seed(5))
    starts = torch.rand(draws, generator=torch.Generator().manual_seed(6)).tolist()
    sums = []
    for start in starts:
        rows_K, weights_K = selected(gating, scores_BT, everyone(scores_BT), rows, start)
        sums.append((values_N[rows_K] * weights_K).sum())
    estimates = torch.stack(sums)
    error = (estimates.mean() - values_N.sum()).abs()
    assert error < 4 * estimates.std() / draws**0.5  # a false alarm once in 16000 seeds, and the seed is fixed
    assert estimates.std() > 0.1  # the test would notice a bias of this size


@each_rule
def test_at_ratio_one_every_label_has_weight_one(gating: GatingSpec) -> None:
    scores_BT = scores_of(3, 11)
    labelled_BT = torch.arange(33).view(3, 11) % 5 > 0
    rows_K, weights_K = selected(gating, scores_BT, labelled_BT, 33, 0.7)
    assert rows_K.tolist() == list(range(33))
    torch.testing.assert_close(weights_K, labelled_BT.flatten().float())


@each_rule
@pytest.mark.parametrize("labels", [0, 1, 6])
def test_fewer_labels_than_rows(gating: GatingSpec, labels: int) -> None:
    labelled_BT = torch.arange(12).view(1, 12) < labels  # a batch of one sequence
    rows_K, weights_K = selected(gating, scores_of(1, 12), labelled_BT, 8)
    assert weights_K.sum() == labels
    assert set(range(labels)) <= set(rows_K.tolist())


@each_rule
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), -1.0])
def test_scores_that_are_none_neither_crash_nor_spread(gating: GatingSpec, bad: float) -> None:
    scores_BT = scores_of(3, 8)
    scores_BT[1, 3] = bad
    _, weights_K = selected(gating, scores_BT, everyone(scores_BT), 6)
    assert weights_K.isfinite().all()


def test_weights_are_bounded_by_the_floor() -> None:
    scores_BT = torch.full((1, 1000), 1e-6)
    scores_BT[0, :10] = 1.0
    _, weights_K = selected(UNBIASED["sampled"], scores_BT, everyone(scores_BT), 100)
    assert weights_K.max() <= (1000 / 100) * (1 + SCORE_FLOOR) / SCORE_FLOOR


@pytest.mark.parametrize("rule", ["sequence aware", "fixed quota"])
def test_a_quota_within_a_hard_sequence_has_bounded_weights(rule: str) -> None:
    """One sequence is so much harder than the others that the mean of all says nothing about its easy tokens."""
    scores_BT = torch.full((16, 100), 1e-6)
    scores_BT[0, :50] = 1.0
    p_N = probabilities(UNBIASED[rule], scores_BT, everyone(scores_BT), 160)
    assert 1 / p_N.min() <= (1600 / 160) * (1 + SCORE_FLOOR) / SCORE_FLOOR


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([0.1, 3.0, 0.2, 2.0], [1, 3]), ([1.0, 1.0, 1.0, 1.0], [0, 1]), ([1.0, 2.0, 1.0, 1.0], [0, 1])],
)
def test_top_takes_the_highest_scores_and_of_equal_ones_the_first(scores: list[float], expected: list[int]) -> None:
    scores_BT = torch.tensor([scores])
    rows_K, weights_K = selected(RULES["top"], scores_BT, everyone(scores_BT), 2)
    assert (rows_K.tolist(), weights_K.tolist()) == (expected, [1, 1])


def test_strata_get_their_share_of_rows_whatever_the_draw() -> None:
    """Scores 1, 2, 3, 4 in strata of 25 tokens: of 20 rows they get 2, 4, 6 and 8."""
    scores_BT = (torch.randperm(100, generator=torch.Generator().manual_seed(1)) // 25 + 1).float().view(4, 25)
    for start in (0.0, 0.5, 0.99):
        rows_K, weights_K = selected(UNBIASED["stratified"], scores_BT, everyone(scores_BT), 20, start)
        strata_K = scores_BT.flatten()[rows_K]
        assert [int((strata_K == stratum).sum()) for stratum in (1, 2, 3, 4)] == [2, 4, 6, 8]
        torch.testing.assert_close(weights_K, 12.5 / strata_K)


@pytest.mark.parametrize(("share", "least"), [(1, 5), (0.5, 2), (0, 0)])
def test_sequences_get_their_quota_first(share: float, least: int) -> None:
    """Nearly all scores lie in the last of four sequences; 20 rows."""
    scores_BT = torch.full((4, 30), 1e-3)
    scores_BT[3] = 1.0
    gating = GatingSpec(selection="SequenceAware", sequence_share=share)
    for start in (0.0, 0.5, 0.99):
        rows_K, _ = selected(gating, scores_BT, everyone(scores_BT), 20, start)
        counts = torch.bincount(rows_K // 30, minlength=4).tolist()
        assert min(counts) >= least
        assert counts[3] >= 20 - 3 * (least + 1)


def test_a_sequence_shorter_than_its_quota_leaves_the_rest_to_the_others() -> None:
    labelled_BT = torch.ones(4, 30, dtype=torch.bool)
    labelled_BT[0, 2:] = False
    rows_K, weights_K = selected(UNBIASED["fixed quota"], scores_of(4, 30), labelled_BT, 40)
    counts = torch.bincount((rows_K // 30)[weights_K > 0], minlength=4).tolist()
    assert (counts[0], sum(counts)) == (2, 40)
    assert min(counts[1:]) >= 10


@pytest.mark.gpu
@each_rule
def test_no_rule_waits_for_the_device_and_the_gpu_agrees_with_the_cpu(
    gating: GatingSpec, waiting_is_an_error: AbstractContextManager[None]
) -> None:
    scores_BT = scores_of(4, 64)
    expected = selected(gating, scores_BT, everyone(scores_BT), 50)
    scores_BT, labelled_BT = scores_BT.cuda(), everyone(scores_BT).cuda()
    with waiting_is_an_error:
        rows_K, weights_K = select(gating, scores_BT, labelled_BT, rows=50, start=0.4)
    assert rows_K.tolist() == expected.rows_K.tolist()
    torch.testing.assert_close(weights_K.cpu(), expected.weights_K)
