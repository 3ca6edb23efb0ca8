"""The gate: which rows carry gradient at a step, with what weight, and whether any are left out at all. It knows scores
and labels, and no model.

Draws follow from seed, step, rank and micro-batch alone, so that a resumed run draws the same. The ratio follows from
what was measured an interval ago (measurement.py) by a pure decision (ratio.py).

Shapes: N = B * T tokens of a micro-batch, B sequences of T tokens, K tokens chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pylon_api.run import GateDecision, GateReport
from pylon_api.training import GatingSelection, GatingSpec, GatingStrategy
from pylon_trainer.gating.depth import Depth
from pylon_trainer.gating.measurement import INTERVAL_STEPS, Clock, Measurement, clock_of
from pylon_trainer.gating.ratio import PLAIN, Belief, Control, rows_of, scheduled_ratio
from pylon_trainer.gating.selection import Selection, build_rule, ranks, select


class Draws(NamedTuple):
    """What is random about a micro-batch: where in [0, 1) its systematic draws start, on the host or on the device."""

    rows: float | Tensor
    leaks: float | Tensor


def build_gate(gating: GatingSpec, *, seed: int, device: torch.device) -> Gate:
    """The gate of this process."""
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return Gate(gating, seed=seed, rank=rank, device=device)


class Gate:
    """Chooses rows, one micro-batch after the other.

    A step asks, in this order: `begin`; `observe` with the scores of all rows, in a plain step where `needs_scores`
    alone; `choose` unless the ratio is 1.
    """

    def __init__(
        self, gating: GatingSpec, *, seed: int, rank: int, device: torch.device, clock: Clock | None = None
    ) -> None:
        """clock: tells what steps cost; None for the device's own."""
        self._gating = gating
        self._seed = seed
        self._rank = rank
        self._control = Control.of(gating)
        self._belief = Belief.initial(self._control)
        self._measurement = Measurement(self._control.ratios, build_rule(gating), device, clock or clock_of(device))
        self._nonfinite_steps = 0
        self._ratio = PLAIN
        self._step = -1
        self._micro_batch = 0

    @property
    def needs_scores(self) -> bool:
        """Whether this micro-batch's scores are wanted even in a plain step."""
        return self._step % INTERVAL_STEPS == 0

    def begin(self, step: int) -> float:
        """Enter a micro-batch of a step; returns the share of its tokens that shall carry gradient, 1 for a plain
        step. Collective at the first micro-batch of an interval."""
        if step == self._step:
            self._micro_batch += 1
            return self._ratio
        self._step, self._micro_batch = step, 0
        if self.needs_scores:
            observation, nonfinite_steps = self._measurement.turn()
            self._belief = self._belief.after(observation, self._control)
            self._nonfinite_steps += nonfinite_steps
        self._ratio = scheduled_ratio(self._gating, step, self._belief.ratio)
        self._measurement.begin(self._ratio, is_counted=not self.needs_scores)
        return self._ratio

    def observe(self, scores_N: Tensor, gradient_norm_N: Tensor, labelled_BT: Tensor, nonfinite_rows: Tensor) -> None:
        """Look at the scores of this micro-batch.

        nonfinite_rows: integer scalar on the device, labelled rows with a logit that is NaN or infinite.
        """
        if self.needs_scores:
            shape = labelled_BT.shape
            self._measurement.observe(scores_N.view(shape), gradient_norm_N.view(shape), labelled_BT, nonfinite_rows)

    def count_nonfinite(self, rows: Tensor) -> None:
        """rows: integer scalar on the device, labelled rows of this micro-batch with a logit that is not finite."""
        self._measurement.count_nonfinite(self._step, rows)

    def draw(self) -> Draws:
        """The random numbers of this micro-batch: multiples of 2^-32, so that no sum with a row's number rounds up."""
        return Draws(*(int(self._generator(purpose).integers(2**32)) / 2**32 for purpose in Draws._fields))

    @property
    def opened_tiers(self) -> int:
        """Tiers of depth that are open, beside the first; the warm-up opens one after the other."""
        tiers, warmup_steps = self._gating.depth_buckets - 1, self._gating.warmup_steps
        return tiers * min(self._step, warmup_steps) // warmup_steps if warmup_steps else tiers

    def choose(self, scores_N: Tensor, labelled_BT: Tensor, ratio: float, draws: Draws) -> Selection:
        """The rows of this micro-batch that carry gradient."""
        if self._gating.strategy is GatingStrategy.RANDOM and self._gating.selection is GatingSelection.TOP:
            generator = torch.Generator(scores_N.device).manual_seed(int(self._generator("order").integers(2**62)))
            scores_N = torch.rand(len(scores_N), generator=generator, device=scores_N.device)
        rows = rows_of(ratio, len(scores_N))
        return select(self._gating, scores_N.view_as(labelled_BT), labelled_BT, rows=rows, start=draws.rows)

    def depth(self, scores_N: Tensor, labelled_N: Tensor, rows_K: Tensor, draws: Draws) -> Depth | None:
        """How far the gradient of each chosen row goes back; None when all go to the bottom. Rows without a label,
        which fill up what labels are too few for, rank last."""
        opened = self.opened_tiers
        if opened == 0:
            return None
        ranks_K = ranks(scores_N[rows_K], labelled_N[rows_K])
        return Depth(ranks_K, self._gating.depth_buckets, opened, self._gating.leak_rate, draws.leaks)

    def report(self) -> GateReport:
        """What the gate is doing, from figures that have reached the host already; the same on every rank."""
        ratio, is_plain, belief = self._ratio, self._ratio == PLAIN, self._belief
        worth = self._control.worth(belief, ratio) if ratio in belief.share else None
        return GateReport(
            decision=GateDecision.PLAIN if is_plain else GateDecision.GATED,
            reason=self._reason(),
            ratio=ratio,
            retained_mass=belief.mass.get(ratio),
            effective_token_share=1.0 if is_plain else worth,
            nonfinite_steps=self._nonfinite_steps,
        )

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that a resumed run needs to decide as this one. Collective."""
        return {
            "gating": self._gating.to_wire(),
            "belief": self._belief.to_state(),
            "measurement": self._measurement.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what state_dict gave on any rank. After a plain run, or another gate's, this one starts anew."""
        if state.get("gating") != self._gating.to_wire():
            return
        self._belief = Belief.from_state(state["belief"])
        self._measurement.load_state_dict(state["measurement"], rank=self._rank)

    def _reason(self) -> str:
        gating = self._gating
        if self._step < gating.warmup_steps:
            return f"warm-up, ratio {self._ratio:g}"
        if gating.final_token_ratio is not None:
            ends = f"from {gating.token_ratio:g} to {gating.final_token_ratio:g}"
            return f"ratioControl Fixed, falling {ends} over {gating.decay_steps} steps"
        return self._belief.reason

    def _generator(self, purpose: str) -> np.random.Generator:
        """Random numbers of this micro-batch, others for every purpose."""
        return np.random.default_rng([self._seed, self._step, self._rank, self._micro_batch, *purpose.encode()])
