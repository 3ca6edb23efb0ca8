"""What is claimed of Resonate, and the verdict on each claim. Pure: rows of results in, lines of a table out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from consensus_recipes import above_exact, by_recipe, mean, recipe_name
from red_team_measures import (
    BELOW,
    BYTES,
    Measure,
    Rows,
    least_speed_to,
    loss_to,
    most_activations_to,
    of_best_recipe,
    projected_share,
    recall_to,
    said,
    speed_to,
    uncounted_bytes,
)
from resonate_table import SHARE, difference, name_of, step_time

THROUGHPUT, QUALITY = "resonate_throughput", "resonate_quality"
CONSENSUS = "consensus"
FIELDS = {
    THROUGHPUT: ("architecture", "device", "sequence", "recompute", "tokens_per_s", "activation_gib"),
    QUALITY: (
        *("architecture", "ablation", "task", "budget", "device", "compile", "parameters", "seed"),
        *("tokens", "seconds", "loss", "recall"),
    ),
    CONSENSUS: (
        *("codec", "ranks", "device", "parameters", "bytes_per_step_mean", "bytes_per_step_peak", "below_bf16_ddp"),
        *("above_exact", "is_exact", "communication_fraction", "step_ms", "channels", "learning_rate", "seed"),
    ),
}
"""Files of results, and what every row of theirs must have."""


@dataclass(frozen=True)
class Claim:
    """A sentence with a limit."""

    text: str
    source: str
    limit: float
    is_floor: bool
    form: str
    """How its figures are written."""
    measure: Measure

    @property
    def goal(self) -> str:
        """The limit, for a person."""
        return f"{'≥' if self.is_floor else '≤'} {self.form.format(self.limit)}"

    def is_met_by(self, value: float) -> bool:
        """A limit itself is within."""
        return value >= self.limit if self.is_floor else value <= self.limit


def _floor(text: str, source: str, limit: float, form: str, measure: Measure) -> Claim:
    return Claim(text, source, limit, True, form, measure)


def _ceiling(text: str, source: str, limit: float, form: str, measure: Measure) -> Claim:
    return Claim(text, source, limit, False, form, measure)


_RIVALS = {"transformer": "the Transformer's", "mamba2": "plain Mamba-2's"}


def _of_losses(variant: str, shown: str, rival: str, whose: str) -> list[Claim]:
    return [
        _ceiling(
            f"{shown}: loss beyond {whose}, equal {budget}", QUALITY, 0, "{:+.4f}", loss_to(variant, rival, budget)
        )
        for budget in ("tokens", "seconds")
    ]


def _of_quality(variant: str, shown: str) -> list[Claim]:
    claims = []
    for rival, whose in _RIVALS.items():
        claims += _of_losses(variant, shown, rival, whose)
        text = f"{shown}: right answers beyond {whose} (MQAR)"
        claims.append(_floor(text, QUALITY, -0.005, "{:+.1%}", recall_to(variant, rival)))
    text = f"{shown}: loss beyond the Transformer's, four fifths of its tokens"
    return [*claims, _ceiling(text, QUALITY, 0, "{:+.4f}", loss_to(variant, "transformer", SHARE))]


CLAIMS = [
    _floor(
        "Throughput, as a multiple of the Transformer's, 8,192 tokens",
        THROUGHPUT,
        1.2,
        "{:.2f}x",
        speed_to("transformer", 8192),
    ),
    _floor(
        "Throughput, as a multiple of the Transformer's, 32,768 tokens",
        THROUGHPUT,
        2.5,
        "{:.2f}x",
        speed_to("transformer", 32768),
    ),
    _floor("The same, by the lower claim", THROUGHPUT, 1.5, "{:.2f}x", speed_to("transformer", 32768)),
    _floor(
        "Throughput, as a multiple of plain Mamba-2's, at worst", THROUGHPUT, 0.85, "{:.2f}x", least_speed_to("mamba2")
    ),
    _ceiling(
        "Peak activations, as a multiple of the Transformer's, at worst",
        THROUGHPUT,
        1 / 3,
        "{:.2f}x",
        most_activations_to("transformer"),
    ),
    _ceiling(
        "The same, both recomputing whole blocks",
        THROUGHPUT,
        1 / 3,
        "{:.2f}x",
        most_activations_to("transformer", "Blocks", "Blocks"),
    ),
    _ceiling(
        "The same, Resonate alone recomputing them",
        THROUGHPUT,
        1 / 3,
        "{:.2f}x",
        most_activations_to("transformer", "Blocks", "Mixers"),
    ),
    _ceiling(
        "Peak activations, as a multiple of plain Mamba-2's, at worst",
        THROUGHPUT,
        1 / 1.5,
        "{:.2f}x",
        most_activations_to("mamba2"),
    ),
    *_of_quality("resonate: attention", "Resonate"),
    *_of_quality("resonate", "Without attention"),
    *(
        claim
        for variant, shown in (
            ("resonate: attention, Muon", "Both with Muon"),
            ("resonate: Muon", "Both with Muon, without attention"),
        )
        for claim in _of_losses(variant, shown, "transformer: Muon", _RIVALS["transformer"])
    ),
    _ceiling(
        "Bytes of a step and rank, all in, mean", CONSENSUS, BYTES, "{:,.0f}", of_best_recipe("bytes_per_step_mean")
    ),
    _floor(
        "Times fewer bytes than bfloat16 data parallel", CONSENSUS, BELOW, "{:.0f}x", of_best_recipe("below_bf16_ddp")
    ),
    _ceiling("Loss above the exact sum's", CONSENSUS, 0.003, "{:.2%}", of_best_recipe("above_exact")),
    _ceiling("The same, at the most", CONSENSUS, 0.01, "{:.2%}", of_best_recipe("above_exact")),
    _ceiling(
        "Communication, as a share of a step", CONSENSUS, 0.01, "{:.2%}", of_best_recipe("communication_fraction")
    ),
    _ceiling("Bytes of the transport that were not counted", CONSENSUS, 0.001, "{:.2%}", uncounted_bytes),
    *(
        _ceiling(
            f"Communication, as a share of a step, {ranks} ranks", CONSENSUS, limit, "{:.2%}", projected_share(ranks)
        )
        for ranks, limit in ((8, 0.01), (64, 0.01), (1024, 0.05))
    ),
]


def judge(results: Mapping[str, Rows]) -> list[dict[str, str]]:
    """A line for each claim: met, missed, or not measured."""
    lines = []
    for claim in CLAIMS:
        found = claim.measure(results.get(claim.source, ()))
        verdict = "not measured" if found is None else "met" if claim.is_met_by(found.value) else "missed"
        shown = "" if found is None else f"{claim.form.format(found.value)} ({found.note})"
        hardware = "" if found is None else found.hardware
        source = f"{claim.source}.json"
        line = {"claim": claim.text, "goal": claim.goal, "measured": shown, "verdict": verdict}
        lines.append(line | {"hardware": hardware, "source": source})
    return lines


def ablations(rows: Rows) -> list[dict[str, str]]:
    """What each part of Resonate adds and costs, beside a trunk that never attends; on every device."""
    lines = []
    for device in dict.fromkeys(row["device"] for row in rows):
        same = [row for row in rows if row["device"] == device and row["task"] == "text"]
        own_rows = [row for row in same if row["architecture"] == "resonate" and row["ablation"]]
        for name in sorted({name_of(row) for row in own_rows}):
            own = next(row for row in own_rows if name_of(row) == name)
            found = {budget: difference(same, name, "resonate", budget) for budget in ("tokens", "seconds")}
            losses = {
                f"loss, equal {budget}": f"{one.mean:+.4f} ({said(one)})" if one else ""
                for budget, one in found.items()
            }
            part = {"part": str(own["ablation"]), "device": str(device), "parameters": f"{own['parameters']:,}"}
            time = step_time(same, name, "resonate")
            lines.append(part | losses | {"time of a step": f"{time:.2f}x" if time else ""})
    return lines


def recipes(rows: Rows) -> list[dict[str, str]]:
    """Every way to exchange that was measured, the fewest bytes first."""
    ordered = sorted(by_recipe(rows), key=lambda runs: (-runs[0]["parameters"], runs[0]["bytes_per_step_mean"]))
    return [
        {
            "exchange": recipe_name(runs[0]),
            "ranks": f"{runs[0]['ranks']} {runs[0]['device']}",
            "parameters": f"{runs[0]['parameters']:,}",
            "learning rate": f"{runs[0]['learning_rate']:g}",
            "bytes a step": f"{mean(runs, 'bytes_per_step_mean'):,.0f}",
            "at most": f"{max(row['bytes_per_step_peak'] for row in runs):,.0f}",
            "below bf16": f"{mean(runs, 'below_bf16_ddp'):.1f}x",
            "above exact": "" if (above := above_exact(runs)) is None else f"{above:+.2%}",
            "of step time": f"{mean(runs, 'communication_fraction'):.1%}",
            "seeds": str(len({row["seed"] for row in runs})),
        }
        for runs in ordered
    ]
