"""Rows of consensus.json by recipe: what runs have in common, what tells them apart, what people call them. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

SETTING = ("architecture", "optimizer", "ranks", "device", "parameters", "steps", "tokens")
"""What runs that are compared have in common, beside the seed."""
RECIPE = ("codec", "local_steps", "outer_rate", "outer_momentum", "beta2", "learning_rate", *SETTING)
"""What tells runs apart, but for the seed."""


def by_recipe(rows: Iterable[Row]) -> list[list[Row]]:
    """Runs that differ in nothing but their seed."""
    return grouped(rows, RECIPE)


def grouped(rows: Iterable[Row], fields: Sequence[str]) -> list[list[Row]]:
    """Runs that are alike in these fields."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(field) for field in fields), []).append(row)
    return list(groups.values())


def recipe_name(row: Row) -> str:
    """Its codec, what local steps it takes, if any, with outer rate and momentum, an optimizer other than AdamW, a
    beta2 of its own, and a model other than the Transformer."""
    name, local_steps = str(row["codec"]), row.get("local_steps") or 1
    if local_steps > 1:
        outer = [f"{row[field]:g}" for field in ("outer_rate", "outer_momentum") if row.get(field) is not None]
        name += f", localSteps {local_steps}" + (f", outer {' and '.join(outer)}" if outer else "")
    optimizer, beta2 = row.get("optimizer") or "AdamW", row.get("beta2")
    name += "" if optimizer == "AdamW" else f", {optimizer}"
    name += "" if beta2 is None else f", beta2 {beta2:g}" if beta2 else ", by sign"
    architecture = row.get("architecture") or "transformer"
    return name if architecture == "transformer" else f"{name}, {architecture.title()}"


def above_exact(runs: Iterable[Row]) -> float | None:
    """Mean loss above the exact sum's, as a share of it, over those that an exact run can be held against."""
    held = [row for row in runs if row["above_exact"] is not None]
    return mean(held, "above_exact") if held else None


def mean(rows: Iterable[Row], field: str) -> float:
    """Of runs of a recipe."""
    return float(statistics.mean(row[field] for row in rows))
