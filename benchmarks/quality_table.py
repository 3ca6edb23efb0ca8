"""What the runs of gate_quality.py say: by phase and strategy, paired seed by seed with plain training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PLAIN = {1.0: "plain", 1.3: "plain, 1.3x the time", 1.6: "plain, 1.6x the time"}
"""Plain strategies by the time that they are given, as a multiple of the others'."""


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By phase and strategy: mean loss, paired difference to plain, and what it takes plain to be as good."""
    losses: dict[tuple[str, str], dict[int, float]] = {}
    rows = [{**row, "phase": f"{row['phase']}, {row['device']}"} for row in rows]
    for row in rows:
        losses.setdefault((row["phase"], row["strategy"]), {})[row["seed"]] = row["loss"]
    table = []
    for (phase, strategy), by_seed in losses.items():
        own = [row for row in rows if (row["phase"], row["strategy"]) == (phase, strategy)]
        plain = losses.get((phase, "plain"), {})
        differences = [loss - plain[seed] for seed, loss in by_seed.items() if seed in plain]
        mean, error = mean_and_error(differences)
        table.append(
            {
                "phase": phase,
                "strategy": strategy,
                "seeds": len(by_seed),
                "ratio": statistics.mean(row["ratio"] for row in own),
                "seconds": statistics.mean(row["seconds"] for row in own),
                "steps": round(statistics.mean(row["steps"] for row in own)),
                "step_ms": statistics.mean(row["step_ms"] for row in own),
                "loss": f"{statistics.mean(by_seed.values()):.4f}",
                "to plain": f"{mean:+.4f}",
                "error": f"{error:.4f}",
                "verdict": "" if strategy == "plain" else verdict(mean, error),
                "plain needs": time_of_plain(losses, phase, statistics.mean(by_seed.values())),
            }
        )
    return table


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, which one value alone does not tell."""
    if len(values) < 2:
        return statistics.mean(values) if values else math.nan, math.nan
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def verdict(mean: float, error: float) -> str:
    if math.isnan(error):
        return "one seed"
    if abs(mean) <= 2 * error:
        return "as plain"
    return "better" if mean < 0 else "lost"


def time_of_plain(losses: Mapping[tuple[str, str], Mapping[int, float]], phase: str, loss: float) -> str:
    """Time after which plain training is as good, as a multiple, read off its longer runs."""
    known = [
        (factor, statistics.mean(by_seed.values()))
        for factor, name in PLAIN.items()
        if (by_seed := losses.get((phase, name)))
    ]
    if len(known) < 2 or loss > known[0][1]:
        return ""
    if loss < min(mean for _, mean in known):
        return f"over {known[-1][0]}x"
    factors, means = zip(*sorted(known, key=lambda pair: pair[1]), strict=True)
    return f"{np.interp(loss, means, factors):.2f}x"
