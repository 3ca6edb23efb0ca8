"""The gate: which rows carry gradient at a step, with what weight. It knows scores and labels, and no model.

Draws follow from seed, step, rank and micro-batch alone, so that a resumed run draws the same.

Shapes: N = B * T tokens of a micro-batch, K of them chosen.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pylon_api.run import GateDecision, GateReport
from pylon_api.training import GatingSelection, GatingSpec, GatingStrategy
from pylon_trainer.gating.selection import Selection, sample, top

WARMUP_RATIOS = 16
"""While the ratio falls it moves in sixteenths, so that only a few shapes occur."""


class Gate:
    """Chooses rows, one micro-batch after the other."""

    def __init__(self, gating: GatingSpec, *, seed: int, rank: int) -> None:
        self._gating = gating
        self._seed = seed
        self._rank = rank
        self._step = -1
        self._micro_batch = 0

    def begin(self, step: int) -> float:
        """Enter a micro-batch of a step; returns the share of its tokens that shall carry gradient, 1 for a plain
        step."""
        self._micro_batch = self._micro_batch + 1 if step == self._step else 0
        self._step = step
        return token_ratio(self._gating, step)

    def report(self) -> GateReport:
        """What the newest step was told; saved_flops_ratio is left to whoever knows the model."""
        ratio = token_ratio(self._gating, max(self._step, 0))
        decision = GateDecision.PLAIN if ratio == 1 else GateDecision.GATED
        return GateReport(decision=decision, reason=f"training.gating sets the ratio {ratio:g}", ratio=ratio)

    def choose(self, scores_N: Tensor, labelled_N: Tensor, ratio: float) -> Selection:
        """The rows of this micro-batch that carry gradient."""
        rows = math.ceil(ratio * len(scores_N))
        draws = np.random.default_rng([self._seed, self._step, self._rank, self._micro_batch])
        if self._gating.selection is GatingSelection.SAMPLED:
            return sample(scores_N, labelled_N, rows=rows, start=float(draws.random()))
        if self._gating.strategy is GatingStrategy.RANDOM:
            generator = torch.Generator(scores_N.device).manual_seed(int(draws.integers(2**62)))
            scores_N = torch.rand(len(scores_N), generator=generator, device=scores_N.device)
        return top(scores_N, labelled_N, rows=rows)


def token_ratio(gating: GatingSpec, step: int) -> float:
    """Share of tokens that carry gradient at a step (from 0): falls from 1 to gating.token_ratio over the warm-up."""
    if step >= gating.warmup_steps:
        return gating.token_ratio
    falling = 1 - (1 - gating.token_ratio) * step / gating.warmup_steps
    return max(gating.token_ratio, math.ceil(falling * WARMUP_RATIOS) / WARMUP_RATIOS)
