"""The figures by which claims about Resonate are judged, out of rows of results. Pure.

Only rows of an accelerator count: a toy on CPUs proves nothing about size. Where several recipes or kernels were
measured the best one is taken, the same for every claim that it has to meet at once, and named.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from consensus_projection import project
from consensus_recipes import Row, by_recipe, mean, recipe_name
from resonate_table import Difference, difference, name_of

Rows = Sequence[Row]
RESONATE = "resonate + attention"
"""As it is by default, in rows of throughput."""
BYTES = 2_000_000
BELOW = 100
LEAST_PARAMETERS = 50_000_000
"""Of a model whose bytes count."""


@dataclass(frozen=True)
class Figure:
    """What was measured of a claim."""

    value: float
    hardware: str
    note: str = ""
    """What a reader must know beside the figure."""


Measure = Callable[[Rows], Figure | None]


def on_accelerator(rows: Iterable[Row]) -> list[Row]:
    """Those that count."""
    return [row for row in rows if row["device"] != "cpu"]


def speed_to(rival: str, tokens: int) -> Measure:
    """Throughput as a multiple of the rival's, at sequences of so many tokens."""

    def measure(rows: Rows) -> Figure | None:
        return _ratio(rows, RESONATE, rival, tokens, "tokens_per_s", max)

    return measure


def least_speed_to(rival: str) -> Measure:
    """The same, at the length where it is least."""

    def measure(rows: Rows) -> Figure | None:
        found = [_ratio(rows, RESONATE, rival, tokens, "tokens_per_s", max) for tokens in _lengths(rows)]
        return min((figure for figure in found if figure), key=lambda figure: figure.value, default=None)

    return measure


def most_activations_to(rival: str, own_recompute: str = "Mixers", rival_recompute: str = "Mixers") -> Measure:
    """Peak activations as a share of the rival's, at the length where it is most. Each by its `training.recompute`."""
    kept = {(RESONATE, own_recompute), (rival, rival_recompute)}

    def measure(rows: Rows) -> Figure | None:
        alike = [row for row in rows if (row["architecture"], row["recompute"]) in kept]
        found = [_ratio(alike, RESONATE, rival, tokens, "activation_gib", min) for tokens in _lengths(alike)]
        return max((figure for figure in found if figure), key=lambda figure: figure.value, default=None)

    return measure


def _lengths(rows: Rows) -> list[int]:
    return sorted({row["sequence"] for row in rows})


def _ratio(
    rows: Rows, own: str, rival: str, tokens: int, field: str, best: Callable[[list[float]], float]
) -> Figure | None:
    def values(architecture: str) -> list[float]:
        return [row[field] for row in same if row["architecture"] == architecture and row[field] is not None]

    same = [row for row in on_accelerator(rows) if row["sequence"] == tokens]
    if not values(own) or not values(rival):
        return None
    return Figure(best(values(own)) / best(values(rival)), str(same[0]["device"]), f"{tokens:,} tokens")


def loss_to(variant: str, rival: str, budget: str) -> Measure:
    """Held-out loss less the rival's, nats a token."""

    def measure(rows: Rows) -> Figure | None:
        counted = on_accelerator(rows)
        found = difference(counted, variant, rival, budget)
        return Figure(found.mean, str(counted[0]["device"]), said(found)) if found else None

    return measure


def said(found: Difference) -> str:
    """How sure a difference is."""
    return "one seed" if found.seeds == 1 else f"± {found.error:.4f}, {found.seeds} seeds"


def recall_to(variant: str, rival: str) -> Measure:
    """Share of right answers less the rival's, over all seeds and numbers of pairs that both have."""

    def measure(rows: Rows) -> Figure | None:
        counted = [row for row in on_accelerator(rows) if row["task"] == "recall"]
        recall = {(name_of(row), row["budget"], row["seed"]): row["recall"] for row in counted}
        both = [rest for name, *rest in recall if name == variant and (rival, *rest) in recall]
        if not both:
            return None
        own, other = (statistics.mean(recall[name, budget, seed] for budget, seed in both) for name in (variant, rival))
        return Figure(own - other, str(counted[0]["device"]), f"{own:.1%} against {other:.1%}")

    return measure


def of_best_recipe(field: str) -> Measure:
    """Mean over seeds of a field of the recipe that comes closest to the exact sum within the budget of bytes."""

    def measure(rows: Rows) -> Figure | None:
        runs = best_recipe(rows)
        if runs is None:
            return None
        ranks = f"{runs[0]['ranks']} ranks on {runs[0]['device']}"
        return Figure(mean(runs, field), ranks, f"{recipe_name(runs[0])}, seeds: {len(runs)}")

    return measure


def best_recipe(rows: Rows) -> list[Row] | None:
    """Its runs; where none keeps to the budget, those of the one with the fewest bytes. None: nothing of that size that
    an exact run can be held against."""
    large = [row for row in on_accelerator(rows) if row["parameters"] >= LEAST_PARAMETERS]
    counted = [row for row in large if not row["is_exact"] and row["above_exact"] is not None]
    groups = by_recipe(counted)
    fitting = [
        runs
        for runs in groups
        if all(row["bytes_per_step_mean"] <= BYTES and row["below_bf16_ddp"] >= BELOW for row in runs)
    ]
    if fitting:
        return min(fitting, key=lambda runs: mean(runs, "above_exact"))
    return min(groups, key=lambda runs: mean(runs, "bytes_per_step_mean"), default=None)


def uncounted_bytes(rows: Rows) -> Figure | None:
    """Largest relative difference between bytes counted and bytes handed to the transport."""
    counted = [row for row in rows if row.get("counted_by_transport")]
    if not counted:
        return None
    largest = max(abs(row["counted_bytes"] / row["counted_by_transport"] - 1) for row in counted)
    return Figure(largest, ", ".join(sorted({str(row["device"]) for row in counted})), f"{len(counted)} runs")


def projected_share(ranks: int) -> Measure:
    """Share of a step that arithmetic gives the best recipe's collectives among so many ranks."""

    def measure(rows: Rows) -> Figure | None:
        runs = best_recipe(rows)
        if runs is None:
            return None
        share = mean([project(row, ranks) for row in runs], "of_step_now")
        return Figure(share, "projection", f"arithmetic, {recipe_name(runs[0])}")

    return measure
