"""A row of benchmarks/results/checkpoint.json, made of timelines and limits, and how far it is from the goals.

`stall_ms`: what the step in which a save begins and its copy is waited for takes longer than a plain one, the median of
the saves; `stall_max_ms` is the worst. `slowdown`: the mean of all steps from the begin of a save to its end over a
plain one, less one; `upload_slowdown` leaves that first step out. `bytes_per_s`: of the whole save, from the moment
that the state is there to the moment that it is durable and committed; `copy_ms` is the part until it may change.
`store_bytes_per_s` and `d2h_bytes_per_s` are limits, `store_fraction` and `d2h_fraction` the shares of them that were
reached. `interval_at_1_percent_s`: the shortest interval of saves that spends 1 % of the time on stalls. `host_gib`:
memory of the process and all below it beyond what they had before the first save.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import torch
from checkpoint_limits import GIB
from checkpoint_loop import Timeline
from measure import device_name


@dataclass(frozen=True)
class Case:
    """What all engines have in common, with the limits that were measured for it."""

    store: str
    state_bytes: int
    store_bytes_per_s: float
    copy_bytes_per_s: float


def row_of(case: Case, engine: str, timelines: Sequence[Timeline], host_bytes: int, matches: bool) -> dict[str, Any]:
    """Of one engine; `matches`: whether what it saved is what the state was."""
    plain_s = median(seconds for timeline in timelines for seconds in timeline.plain_s)
    stalls_s = [timeline.first_s - plain_s for timeline in timelines]
    upload_s = [seconds for timeline in timelines for seconds in timeline.upload_s]
    save_s = median(timeline.durable_s - timeline.ready_s for timeline in timelines)
    copies_s = [timeline.copied_s - timeline.ready_s for timeline in timelines if timeline.copied_s is not None]
    copy_s = median(copies_s) if copies_s else None
    return {
        "engine": engine,
        "store": case.store,
        "state_gib": case.state_bytes / GIB,
        "device": device_name(),
        "stall_ms": median(stalls_s) * 1e3,
        "step_ms": plain_s * 1e3,
        "slowdown": mean([timeline.first_s for timeline in timelines] + upload_s) / plain_s - 1,
        "bytes_per_s": case.state_bytes / save_s,
        "store_bytes_per_s": case.store_bytes_per_s,
        "d2h_fraction": None if copy_s is None else case.state_bytes / copy_s / case.copy_bytes_per_s,
        "host_gib": host_bytes / GIB,
        "stall_fraction_of_step": median(stalls_s) / plain_s,
        "stall_max_ms": max(stalls_s) * 1e3,
        "upload_slowdown": mean(upload_s) / plain_s - 1 if upload_s else None,
        "upload_steps": len(upload_s) / len(timelines),
        "store_fraction": case.state_bytes / save_s / case.store_bytes_per_s,
        "save_s": save_s,
        "copy_ms": None if copy_s is None else copy_s * 1e3,
        "d2h_bytes_per_s": case.copy_bytes_per_s,
        "interval_s": median(timeline.ends_s[-1] - timeline.ends_s[0] for timeline in timelines),
        "interval_at_1_percent_s": 100 * max(0.0, median(stalls_s)),
        "checkpoints": len(timelines),
        "matches": matches,
        "torch": torch.__version__,
    }


def goals(row: dict[str, Any]) -> Iterator[str]:
    """What was to be reached, and what was."""
    if row["copy_ms"] is not None and row["copy_ms"] < row["step_ms"]:
        yield f"stall {row['stall_fraction_of_step']:.1%} of a step (at most 10 %)"
    else:
        yield f"stall {row['stall_fraction_of_step']:.2f} steps, for the copy outlasts a step (at most 1)"
    if row["upload_slowdown"] is not None:
        yield f"slowdown while uploading {row['upload_slowdown']:.1%} (at most 5 %)"
    yield f"{row['store_fraction']:.0%} of the store's limit (at least 80 %)"
    if row["d2h_fraction"] is not None:
        yield f"{row['d2h_fraction']:.0%} of the copy's limit (at least 90 %)"
