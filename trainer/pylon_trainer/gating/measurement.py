"""Measurement: what the scores of a step say about every ratio, and what steps cost; on the host one interval later.

Statistics gather on the device. At the start of every interval they are summed over the ranks and set off for pinned
memory; at the start of the next one they are read, by all ranks at the same step. So nobody waits for the device, and
all know the same. Sums are integers, in fixed point: they come out the same in whatever order they are added, and so
the same after a resume.

Shapes: N = B * T tokens of a micro-batch, R ratios, I steps of an interval.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from pylon_trainer.gating.ratio import Observation, rows_of
from pylon_trainer.gating.selection import Rule, order
from pylon_trainer.runtime.arrivals import Arrival
from pylon_trainer.runtime.distributed import collective

INTERVAL_STEPS = 8
"""Steps of an interval. The scores of its first step are looked at."""

FIXED_POINT = 2**32
"""1 in the sums of shares; leaves room for 2^31 micro-batches."""

LEAST_SAMPLES = 5
"""Steps of one ratio in an interval whose median counts: the first may compile and, with recordings, the second
records; the median of five is neither."""


class Clock(Protocol):
    """Measures what lies between two moments."""

    def mark(self) -> Any:
        """This moment of the work that is under way."""
        ...

    def nanoseconds(self, earlier: Any, later: Any) -> int:
        """Between two marks that lie an interval back."""
        ...


class HostClock:
    """For work that is done when its call returns."""

    def mark(self) -> int:
        return time.perf_counter_ns()

    def nanoseconds(self, earlier: int, later: int) -> int:
        return later - earlier


class DeviceClock:
    """For a CUDA device, which does later what it is told."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def nanoseconds(self, earlier: torch.cuda.Event, later: torch.cuda.Event) -> int:
        later.synchronize()
        return int(earlier.elapsed_time(later) * 1e6)


def clock_of(device: torch.device) -> Clock:
    """The clock that tells the time of work on a device."""
    return DeviceClock() if device.type == "cuda" else HostClock()


class _Timed(NamedTuple):
    ratio: float
    nanoseconds: Callable[[], int]


class Measurement:
    """Of one gate, step after step."""

    def __init__(self, ratios: Sequence[float], rule: Rule, device: torch.device, clock: Clock) -> None:
        self._ratios = tuple(ratios)
        self._rule = rule
        self._device = device
        self._clock = clock
        self._sums = torch.zeros(2 + 3 * len(ratios) + INTERVAL_STEPS, dtype=torch.int64, device=device)
        """Micro-batches seen, ranks; by ratio: mass, share and time; by step of the interval: rows without a finite
        score."""
        self._under_way = Arrival.of(torch.zeros_like(self._sums))
        """Figures of one interval; all 0 while there are none."""
        self._step: tuple[float, Any] | None = None
        self._timed: list[_Timed] = []
        self._timed_before: list[_Timed] = []

    def begin(self, ratio: float, *, is_counted: bool) -> None:
        """A step of this ratio begins, and so the one before it has ended. is_counted: whether its time shall be."""
        now = self._clock.mark()
        if self._step is not None:
            before, started = self._step
            self._timed.append(_Timed(before, lambda: self._clock.nanoseconds(started, now)))
        self._step = (ratio, now) if is_counted else None

    @torch.no_grad()
    def observe(self, scores_BT: Tensor, gradient_norm_BT: Tensor, labelled_BT: Tensor, nonfinite_rows: Tensor) -> None:
        """Look at the scores of a micro-batch. One with rows that are not finite tells nothing."""
        labelled_N = labelled_BT.flatten()
        norm_N = torch.where(labelled_N, gradient_norm_BT.flatten().double().nan_to_num(), 0.0)
        is_good = (nonfinite_rows == 0) & (norm_N.sum() > 0)
        total = norm_N.sum().clamp_min(1e-30)

        tokens = len(norm_N)
        rows_R = torch.stack([torch.full((), rows_of(r, tokens), device=self._device) for r in self._ratios])
        held_N = norm_N[order(scores_BT.flatten(), labelled_N)].cumsum(0)
        mass_R = held_N[rows_R - 1] / total

        # A gated step is worth (share of the signal)^2 * sum g^2 / sum g^2/p plain ones; see ratio.py. The signal is
        # whole when every token may be drawn.
        p_RN = self._rule(scores_BT, labelled_BT, rows_R)
        signal_R = torch.where(p_RN > 0, norm_N, 0.0).sum(1) / total
        noise_R = torch.where(p_RN > 0, norm_N.square() / p_RN.clamp_min(1e-12), 0.0).sum(1)
        share_R = signal_R.square() * norm_N.square().sum() / noise_R.clamp_min(1e-30)

        shares_2R = (torch.cat([mass_R, share_R]).clamp(0, 1) * FIXED_POINT).round().long()
        count = len(self._ratios)
        self._sums[0] += is_good
        self._sums[2 : 2 + 2 * count] += torch.where(is_good, shares_2R, 0)

    def count_nonfinite(self, step: int, rows: Tensor) -> None:
        """rows: rows of a micro-batch of this step without a finite score."""
        self._sums[len(self._sums) - INTERVAL_STEPS + step % INTERVAL_STEPS] += rows

    def turn(self) -> tuple[Observation, int]:
        """An interval begins: what the one before the last showed, with its steps that were not finite; empty when it
        is not known yet. Collective."""
        arrived = self._arrived()
        self._depart()
        return arrived

    def state_dict(self) -> dict[str, Any]:
        """Tensors on the device and plain values, the same on every rank but for times. Collective; waits for no more
        of the device's work than the steps before this one."""
        return {
            "sums": _sum_over_ranks(self._sums.clone()),
            "under_way": self._under_way.figures,
            "timed": [[timed.ratio, timed.nanoseconds()] for timed in self._timed],
            "timed_before": [[timed.ratio, timed.nanoseconds()] for timed in self._timed_before],
        }

    def load_state_dict(self, state: Mapping[str, Any], *, rank: int) -> None:
        """What state_dict gave on any rank, of a gate with the same ratios."""
        # The sums are those of all ranks: one of them goes on with them.
        self._sums = state["sums"].to(self._device) * (rank == 0)
        self._under_way = Arrival.of(state["under_way"].to(self._device))
        self._timed = [_restored(ratio, ns) for ratio, ns in state["timed"]]
        self._timed_before = [_restored(ratio, ns) for ratio, ns in state["timed_before"]]
        self._step = None

    def _arrived(self) -> tuple[Observation, int]:
        seen, ranks, *figures = map(int, self._under_way.wait())
        count = len(self._ratios)
        mass_R, share_R, ns_R = figures[:count], figures[count : 2 * count], figures[2 * count : 3 * count]
        nonfinite_I = figures[3 * count :]

        def by_ratio(sums_R: list[int], divisor: int) -> dict[float, float]:
            return {r: total / divisor for r, total in zip(self._ratios, sums_R, strict=True)} if divisor else {}

        observation = Observation(
            mass=by_ratio(mass_R, seen * FIXED_POINT),
            share=by_ratio(share_R, seen * FIXED_POINT),
            seconds={ratio: s for ratio, s in by_ratio(ns_R, ranks * 10**9).items() if s > 0},
        )
        return observation, sum(rows > 0 for rows in nonfinite_I)

    def _depart(self) -> None:
        on_cuda = self._device.type == "cuda"
        medians_ns = _medians(self._timed_before)
        self._timed_before, self._timed = self._timed, []
        own = [1, *[0] * 2 * len(self._ratios), *(medians_ns.get(ratio, 0) for ratio in self._ratios)]
        vector = self._sums.clone()
        vector[1 : 1 + len(own)] += torch.tensor(own, pin_memory=on_cuda).to(self._device, non_blocking=True)
        self._under_way = Arrival.of(_sum_over_ranks(vector))
        self._sums.zero_()


def _medians(timed: list[_Timed]) -> dict[float, int]:
    """By ratio; without those that were timed too rarely."""
    samples: defaultdict[float, list[int]] = defaultdict(list)
    for ratio, nanoseconds in timed:
        samples[ratio].append(nanoseconds())
    return {r: int(statistics.median(ns)) for r, ns in samples.items() if len(ns) >= LEAST_SAMPLES}


def _restored(ratio: float, nanoseconds: int) -> _Timed:
    return _Timed(ratio, lambda: nanoseconds)


def _sum_over_ranks(figures: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        with collective():
            dist.all_reduce(figures)
    return figures
