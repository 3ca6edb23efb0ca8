"""How hard the tokens of a step are for the model: counts in fixed bins, made on the device.

Bins do not follow the data, so that counts of micro-batches, ranks and hours add up. Nothing here waits for the device.

Shapes: N tokens of a micro-batch; S = 2 scores, gradient norm and entropy; M bounds of their bins.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pylon_api.run import DifficultyReport, Histogram

GRADIENT_NORM_BOUNDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4)
"""The norm is at most the square root of 2."""
ENTROPY_BOUNDS = (0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0, 12.0)
"""Nats; a vocabulary of 160,000 has at most 12."""

SHAPE = (2, len(ENTROPY_BOUNDS) + 2)
"""Of a tally: for each score its bins, the one above every bound, and the sum of the values."""


@torch.no_grad()
def measure(gradient_norm_N: Tensor, entropy_N: Tensor, labelled_N: Tensor) -> Tensor:
    """A tally of SHAPE, float64. Tokens without a label or with a score that is not finite are left out."""
    values_SN = torch.stack([gradient_norm_N, entropy_N]).float()
    counted_SN = labelled_N & values_SN.isfinite()
    within_SNM = values_SN[:, :, None] <= _bounds(values_SN.device)[:, None, :]
    at_most_SM = (within_SNM & counted_SN[:, :, None]).sum(dim=1)
    totals_S1 = counted_SN.sum(dim=1, keepdim=True)
    counts = torch.cat([at_most_SM, totals_S1], dim=1).diff(dim=1, prepend=torch.zeros_like(totals_S1))
    sums_S1 = torch.where(counted_SN, values_SN, 0).sum(dim=1, keepdim=True, dtype=torch.float64)
    return torch.cat([counts.double(), sums_S1], dim=1)


def describe(tally: list[list[float]]) -> DifficultyReport:
    """The sum of many tallies, as people and Prometheus read it."""
    gradient_norm, entropy = tally
    return DifficultyReport(
        gradient_norm=_histogram(GRADIENT_NORM_BOUNDS, gradient_norm), entropy=_histogram(ENTROPY_BOUNDS, entropy)
    )


def _histogram(bounds: tuple[float, ...], tally: list[float]) -> Histogram:
    *counts, total = tally
    return Histogram(bounds=list(bounds), counts=[int(count) for count in counts], sum=total)


@functools.cache
def _bounds(device: torch.device) -> Tensor:
    """S x M; kept on the device, because copying it there would wait."""
    return torch.tensor([GRADIENT_NORM_BOUNDS, ENTROPY_BOUNDS], device=device)
