"""What the runs of resonate_quality.py say: every variant beside its rivals, paired seed by seed. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quality_table import mean_and_error

Row = Mapping[str, Any]


SHARE = "0.8 tokens"
"""Budget of four fifths of the tokens: the claim that they are enough."""
SPEED = "speed"
"""Budget of a few steps, to see what one takes."""


@dataclass(frozen=True)
class Difference:
    """Of losses of the same seeds, in nats; negative is better."""

    mean: float
    error: float
    """Standard error of the mean; not a number of one seed."""
    seeds: int

    @property
    def verdict(self) -> str:
        """One word, by two standard errors."""
        if math.isnan(self.error):
            return "one seed"
        if abs(self.mean) <= 2 * self.error:
            return "equal"
        return "better" if self.mean < 0 else "worse"


def name_of(row: Row) -> str:
    """Architecture, and what differs from it."""
    return f"{row['architecture']}: {row['ablation']}" if row["ablation"] else str(row["architecture"])


def difference(rows: Iterable[Row], variant: str, rival: str, budget: str) -> Difference | None:
    """Text loss of a variant within a budget, against the rival's. None: no seed in common.

    The rival has all tokens against fewer, and the Transformer's seconds are those it took for them. Runs of other
    lengths, left from other calls, are no rivals, nor for seconds those compiled in another way.
    """
    there = budget if budget == "seconds" and rival != "transformer" else "tokens"
    runs = {(name_of(row), row["budget"], row["seed"]): row for row in rows if row["task"] == "text"}
    seeds = sorted({seed for _, _, seed in runs})
    pairs = [(runs.get((variant, budget, seed)), runs.get((rival, there, seed))) for seed in seeds]
    found = [own["loss"] - other["loss"] for own, other in pairs if own and other and _are_comparable(own, other)]
    return Difference(*mean_and_error(found), len(found)) if found else None


def _are_comparable(own: Row, other: Row) -> bool:
    if own["budget"] == "seconds":
        return bool(own["compile"] == other["compile"] and abs(own["seconds"] / other["seconds"] - 1) < 0.2)
    share = 0.8 if own["budget"] == SHARE else 1.0
    return bool(abs(own["tokens"] / other["tokens"] - share) < 0.02)


def step_time(rows: Iterable[Row], variant: str, rival: str) -> float | None:
    """Of a variant, as a multiple of the rival's, in runs to time it or else in those of equal tokens. None: no runs of
    both."""
    for budget in (SPEED, "tokens"):
        timed = [row for row in rows if row["budget"] == budget]
        own, other = ([row for row in timed if name_of(row) == name] for name in (variant, rival))
        if own and other:
            return _token_s(own) / _token_s(other)
    return None


def _token_s(rows: Sequence[Row]) -> float:
    return float(sum(row["seconds"] for row in rows) / sum(row["tokens"] for row in rows))


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A line for each variant, task and budget (or number of pairs)."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["device"], row["task"], row["budget"], name_of(row)), []).append(row)
    table = []
    for (device, task, budget, name), own in groups.items():
        same = [row for row in rows if row["device"] == device]
        against = {rival: difference(same, name, rival, budget) for rival in ("transformer", "mamba2")}
        table.append(
            {
                "device": device,
                "task": task,
                "budget": budget,
                "variant": name,
                "parameters": own[0]["parameters"],
                "seeds": len(own),
                "tokens": round(statistics.mean(row["tokens"] for row in own)),
                "seconds": statistics.mean(row["seconds"] for row in own),
                "loss": statistics.mean(row["loss"] for row in own),
                "recall": statistics.mean(row["recall"] for row in own) if task == "recall" else "",
                **{f"to {rival}": _said(found) for rival, found in against.items()},
            }
        )
    return table


def _said(found: Difference | None) -> str:
    return f"{found.mean:+.4f} ± {found.error:.4f} {found.verdict}" if found else ""
