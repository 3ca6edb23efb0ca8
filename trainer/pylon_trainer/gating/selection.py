"""Selection: which tokens of a micro-batch carry gradient, and with what weight.

A rule gives every token the probability with which it is to be chosen; one draw then takes exactly as many rows as were
asked for, each as often as its probability says. Weights of 1 / probability keep a weighted sum over the chosen rows
unbiased, whatever the rule. `top` is the rule that gives 1 and 0, so it alone is biased.

Everything has a fixed shape and stays on the device, so that nothing waits for it. Tokens without a label have
probability 0; scores are sums and so comparable among tokens of one call only.

Shapes: N = B * T tokens, B sequences of T tokens, K selected rows, R numbers of rows that probabilities are asked for,
S strata, X any number of lines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pylon_api.training import GatingSelection, GatingSpec
from pylon_trainer.kernels.bucket import bucket

SCORE_FLOOR = 0.1
"""Least score that a rule uses, as a share of the mean score. It raises the mean by a tenth at most, so no weight
exceeds eleven times that of a uniform draw; one from the token's own sequence where quotas are dealt out."""

Rule = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From scores B x T, labelled B x T and numbers of rows R to float64 probabilities R x N, none above 1, that add up to
the number of rows (or of labelled tokens, if that is less)."""


class Selection(NamedTuple):
    """K rows, distinct and rising, and their weights. Where fewer than K tokens have a label, the rest are rows without
    a label, of weight 0."""

    rows_K: Tensor
    weights_K: Tensor


def build_rule(gating: GatingSpec) -> Rule:
    """The rule that the spec asks for."""
    match gating.selection:
        case GatingSelection.TOP:
            return top
        case GatingSelection.STRATIFIED:
            return lambda scores_BT, labelled_BT, rows_R: stratified(
                scores_BT, labelled_BT, rows_R, strata=gating.strata
            )
        case GatingSelection.SEQUENCE_AWARE:
            return lambda scores_BT, labelled_BT, rows_R: sequence_aware(
                scores_BT, labelled_BT, rows_R, share=gating.sequence_share
            )
        case GatingSelection.SAMPLED:
            return proportional


def select(
    gating: GatingSpec, scores_BT: Tensor, labelled_BT: Tensor, *, rows: int, start: float | Tensor
) -> Selection:
    """The rows of a micro-batch by the spec's rule; `start` in [0, 1) is all that is random about them."""
    labelled_N = labelled_BT.flatten()
    if gating.selection is GatingSelection.TOP:
        return draw(highest(scores_BT.flatten(), labelled_N, rows), labelled_N, rows=rows, start=start)
    probabilities_1N = build_rule(gating)(scores_BT, labelled_BT, torch.full((1,), rows, device=scores_BT.device))
    # In the order of the scores strata stand together, and so get their quotas.
    is_ordered = gating.selection is GatingSelection.STRATIFIED
    line_N = order(scores_BT.flatten(), labelled_N) if is_ordered else None
    return draw(probabilities_1N[0], labelled_N, rows=rows, start=start, line_N=line_N)


def all_rows(labelled_BT: Tensor) -> Selection:
    """Every token; those with a label have weight 1."""
    labelled_N = labelled_BT.flatten()
    return Selection(torch.arange(len(labelled_N), device=labelled_N.device), labelled_N.float())


def draw(
    probabilities_N: Tensor, labelled_N: Tensor, *, rows: int, start: float | Tensor, line_N: Tensor | None = None
) -> Selection:
    """Systematic sampling (Madow 1949): exactly `rows` tokens, each expected as often as its probability says.

    The tokens lie on a line, each as long as its probability; pointers one apart, the first at `start` in [0, 1),
    select the tokens they fall on. What stands together on the line gets its share but for less than one row.

    line_N: the tokens in their order on the line; None for that of their places, where sequences stand together.
    """
    if line_N is not None:
        places_K, weights_K = draw(probabilities_N[line_N], labelled_N[line_N], rows=rows, start=start)
        rows_K, order_K = line_N[places_K].sort()
        return Selection(rows_K, weights_K[order_K])
    missing = (rows - labelled_N.sum()).clamp_min(0)
    spare_N = ~labelled_N & ((~labelled_N).cumsum(0) <= missing)
    ends_N = (probabilities_N + spare_N).cumsum(0)
    pointers_K = torch.arange(rows, device=ends_N.device, dtype=torch.float64) + start
    rows_K = torch.searchsorted(ends_N, pointers_K, right=True).clamp_max(len(ends_N) - 1)
    weights_K = torch.where(labelled_N[rows_K], probabilities_N[rows_K].clamp_min(1e-12).reciprocal(), 0.0)
    return Selection(rows_K, weights_K.float())


def proportional(scores_BT: Tensor, labelled_BT: Tensor, rows_R: Tensor) -> Tensor:
    """As likely as the score is high."""
    scores_N, labelled_N = floored(scores_BT, labelled_BT).flatten(), labelled_BT.flatten()
    budget_R = rows_R.clamp_max(labelled_N.sum())
    return fill(scores_N.expand(len(rows_R), -1), labelled_N.double().expand(len(rows_R), -1), budget_R)


def top(scores_BT: Tensor, labelled_BT: Tensor, rows_R: Tensor) -> Tensor:
    """1 for the highest scores; of equal ones for the earlier."""
    rank_N = ranks(scores_BT.flatten(), labelled_BT.flatten())
    return ((rank_N < rows_R[:, None]) & labelled_BT.flatten()).double()


def highest(scores_N: Tensor, labelled_N: Tensor, rows: int) -> Tensor:
    """As `top` for one number of rows that the host knows, in linear time. scores_N: float32."""
    return ((bucket(_ranked(scores_N, labelled_N), (rows,)).bucket_N == 0) & labelled_N).double()


def stratified(scores_BT: Tensor, labelled_BT: Tensor, rows_R: Tensor, *, strata: int) -> Tensor:
    """As likely as the mean score of the token's stratum is high: one rate for all tokens of like score, so that no few
    of them draw the rest of their stratum's rows. A stratum that is full leaves rows to the others."""
    scores_N, labelled_N = floored(scores_BT, labelled_BT).flatten(), labelled_BT.flatten()
    rank_N = ranks(scores_N, labelled_N)
    ends_S = torch.arange(1, strata + 1, device=rank_N.device) * labelled_N.sum() // strata
    stratum_N = torch.searchsorted(ends_S, rank_N, right=True).clamp_max(strata - 1)
    member_SN = (stratum_N == torch.arange(strata, device=rank_N.device)[:, None]) & labelled_N
    means_S = (member_SN * scores_N).sum(1) / member_SN.sum(1).clamp_min(1)
    return proportional(means_S[stratum_N].view_as(scores_BT), labelled_BT, rows_R)


def sequence_aware(scores_BT: Tensor, labelled_BT: Tensor, rows_R: Tensor, *, share: float) -> Tensor:
    """First an equal quota for every sequence, as far as its labels go, then the rest by score; `share` of the rows
    make up the quotas."""
    room_BT = labelled_BT.double()
    sequences, lines = len(scores_BT), len(rows_R)
    quota_R = (rows_R * share / sequences).long()
    quota_RB = torch.minimum(quota_R[:, None], labelled_BT.sum(1))
    # By the sequence's own floor: a quota is dealt out within it, so that of all would not bound its weights.
    own_BT = floored(scores_BT, labelled_BT, by_sequence=True)
    even_RBT = fill(own_BT.expand(lines, -1, -1), room_BT.expand(lines, -1, -1), quota_RB)
    even_RN = even_RBT.flatten(1)
    budget_R = rows_R.clamp_max(labelled_BT.sum()) - quota_RB.sum(1)
    scores_N = floored(scores_BT, labelled_BT).flatten()
    return even_RN + fill(scores_N.expand(lines, -1), room_BT.flatten() - even_RN, budget_R)


def floored(scores_BT: Tensor, labelled_BT: Tensor, *, by_sequence: bool = False) -> Tensor:
    """float64 scores, positive where there is a label and 0 elsewhere, none far below the mean of all or of its
    sequence. One that is not finite, or negative, counts as
    0: a step with the former will be skipped, but not before all shapes have been gone through."""
    scores_BT = torch.where(labelled_BT & scores_BT.isfinite(), scores_BT.double().clamp_min(0), 0.0)
    over = 1 if by_sequence else (0, 1)
    floor_B1 = SCORE_FLOOR * scores_BT.sum(over, keepdim=True) / labelled_BT.sum(over, keepdim=True).clamp_min(1)
    return torch.where(labelled_BT, scores_BT.clamp_min(floor_B1) + 1e-9, 0.0)


def order(scores_N: Tensor, labelled_N: Tensor) -> Tensor:
    """Places of the tokens from the highest score to the lowest; of equal scores the earlier comes first, and tokens
    without a label come last."""
    return _ranked(scores_N, labelled_N).argsort(descending=True, stable=True)


def _ranked(scores_N: Tensor, labelled_N: Tensor) -> Tensor:
    """Scores that can be ordered, lowest where there is no label."""
    return torch.where(labelled_N, scores_N.nan_to_num(), -torch.inf)


def ranks(scores_N: Tensor, labelled_N: Tensor) -> Tensor:
    """Of every token in that order, from 0."""
    return order(scores_N, labelled_N).argsort()


def fill(scores_XN: Tensor, room_XN: Tensor, budget_X: Tensor) -> Tensor:
    """Deal out a budget in proportion to the scores, to no place more than its room: min(room, scale * score).

    scores_XN: float64, positive wherever there is room. budget_X: at most the room of its line.

    In falling order of score / room, place i is full when even the share that it would get of what is left reaches its
    room: (budget - room before i) * score_i >= (sum of the scores from i on) * room_i. Once that fails it fails for all
    that follow.
    """
    order_XN = (scores_XN / room_XN.clamp_min(1e-12)).argsort(dim=-1, descending=True, stable=True)
    sorted_XN, sorted_room_XN = scores_XN.gather(-1, order_XN), room_XN.gather(-1, order_XN)
    left_XN = sorted_XN.flip(-1).cumsum(-1).flip(-1)
    room_before_XN = sorted_room_XN.cumsum(-1) - sorted_room_XN
    is_full_XN = (budget_X[..., None] - room_before_XN) * sorted_XN >= left_XN * sorted_room_XN
    full_X1 = is_full_XN.long().cumprod(-1).sum(-1, keepdim=True).clamp_max(scores_XN.shape[-1] - 1)
    rest_X1 = budget_X[..., None] - room_before_XN.gather(-1, full_X1)
    scale_X1 = rest_X1 / left_XN.gather(-1, full_X1).clamp_min(1e-12)
    # Budgets are whole numbers and so is the room of a line, up to rounding.
    has_enough_X1 = budget_X[..., None] >= room_XN.sum(-1, keepdim=True) - 0.5
    return torch.where(has_enough_X1, room_XN, torch.minimum(scores_XN * scale_X1.clamp_min(0), room_XN))
