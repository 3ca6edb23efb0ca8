"""Selection: which rows carry gradient, and with what weight. Pure tensor functions; nothing here waits for a device.

Shapes: N tokens of a micro-batch, K rows selected.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SCORE_FLOOR = 0.1
"""Least score that sampling uses, as a share of the mean score: no weight exceeds ten times the uniform one."""


class Selection(NamedTuple):
    """K rows, distinct and rising, and their weights. Where fewer than K tokens have a label, the rest are rows without
    a label, of weight 0."""

    rows_K: Tensor
    weights_K: Tensor


def sample(scores_N: Tensor, labelled_N: Tensor, *, rows: int, start: float) -> Selection:
    """Systematic sampling with probability proportional to the score (Madow 1949).

    The tokens lie on a line, each as long as its inclusion probability; pointers one apart, the first at `start` in
    [0, 1), select the tokens they fall on. That draws exactly `rows` tokens, each expected as often as its probability
    says, so weights of 1 / probability make any weighted sum unbiased.
    """
    probabilities_N = inclusion_probabilities(scores_N, labelled_N, rows)
    missing = (rows - labelled_N.sum()).clamp_min(0)
    spare_N = ~labelled_N & ((~labelled_N).cumsum(0) <= missing)
    ends_N = (probabilities_N + spare_N).cumsum(0)
    places_K = torch.arange(rows, device=scores_N.device, dtype=torch.float64)
    rows_K = torch.searchsorted(ends_N, places_K + start, right=True).clamp_max(len(scores_N) - 1)
    weights_K = torch.where(labelled_N[rows_K], probabilities_N[rows_K].clamp_min(1e-12).reciprocal(), 0.0)
    return Selection(rows_K, weights_K.float())


def top(scores_N: Tensor, labelled_N: Tensor, *, rows: int) -> Selection:
    """The rows of highest score, each of weight 1."""
    rows_K = torch.where(labelled_N, scores_N, -1.0).topk(rows).indices.sort().values
    return Selection(rows_K, labelled_N[rows_K].float())


def inclusion_probabilities(scores_N: Tensor, labelled_N: Tensor, rows: int) -> Tensor:
    """float64 probabilities proportional to the floored scores, none above 1, that add up to `rows` (or to the number
    of labelled tokens, if that is less).

    In falling order of score, token i is certain when even the share that it would get of what is left reaches 1:
    (rows - i) * score_i >= sum of the scores from i on. Once that fails it fails for all that follow.
    """
    labelled = labelled_N.sum()
    masked_N = torch.where(labelled_N, scores_N.double(), 0.0)
    floor = SCORE_FLOOR * masked_N.sum() / labelled.clamp_min(1)
    floored_N = torch.where(labelled_N, masked_N.clamp_min(floor) + 1e-9, 0.0)
    budget = labelled.clamp_max(rows)

    sorted_N = floored_N.sort(descending=True).values
    left_N = sorted_N.flip(0).cumsum(0).flip(0)
    places_N = torch.arange(len(scores_N), device=scores_N.device)
    certain = ((budget - places_N) * sorted_N >= left_N).cumprod(0).sum()
    # index_select, because indexing with a device's scalar would wait for the device.
    rest = left_N.index_select(0, certain.clamp_max(len(scores_N) - 1).reshape(1))
    scale = (budget - certain) / rest.clamp_min(1e-12)
    return torch.where(budget < labelled, (floored_N * scale).clamp_max(1.0), labelled_N.double())
