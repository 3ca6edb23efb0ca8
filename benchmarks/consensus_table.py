"""The tables of docs/consensus.md, from what consensus.py has measured.

python benchmarks/consensus_table.py            # prints them
python benchmarks/consensus_table.py --write    # puts them between the marks in docs/consensus.md
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from consensus_projection import RANKS, project
from measure import RESULTS, read_rows

PAGE = Path(__file__).parents[1] / "docs" / "consensus.md"
BEGIN, END = "<!-- begin: benchmarks/consensus_table.py -->\n", "<!-- end: benchmarks/consensus_table.py -->\n"

Row = Mapping[str, Any]
RECIPE = ("codec", "local_steps", "outer_rate", "outer_momentum", "optimizer", "beta2", "learning_rate")
"""What tells runs of a table apart, but for the seed."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name} instead of to the terminal")
    tables = build_tables(read_rows("consensus", RESULTS))
    if not parser.parse_args().write:
        print(tables, end="")
        return
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + tables + END + after)


def build_tables(rows: Sequence[Row]) -> str:
    """Markdown: a table for each set of runs that can be compared, then the projection."""
    parts = []
    for key, group in _grouped(rows, ("device", "ranks", "architecture", "parameters", "steps", "tokens")).items():
        device, ranks, architecture, parameters, steps, tokens = key
        where = f"{ranks} H200, NCCL" if device == "cuda" else f"{ranks} processes, gloo"
        model = f"{architecture.title()} of {parameters / 1e6:.1f}M parameters"
        title = f"**{where}, {model}, {steps} steps of {tokens // steps:,} tokens**"
        parts.append(f"{title}\n\n{_runs_table(group)}")
    parts.append(f"**Projection, not measured**\n\n{_projection_table(rows)}")
    return "\n" + "\n".join(parts) + "\n"


def _runs_table(rows: Sequence[Row]) -> str:
    lines = []
    for own in _grouped(rows, RECIPE).values():
        above = [row["above_exact"] for row in own if row["above_exact"] is not None]
        lines.append(
            [
                _describe(own[0]),
                f"{own[0]['learning_rate']:.2g}",
                f"{_mean(own, 'bytes_per_step_mean') / 1e6:.3g}",
                f"{_mean(own, 'bytes_per_step_peak') / 1e6:.3g}",
                f"{_mean(own, 'below_bf16_ddp'):.3g}x",
                f"{_mean(own, 'loss'):.4f}",
                f"{100 * statistics.mean(above):+.2f} %" if any(above) else "",
                str(len(own)),
                f"{100 * _mean(own, 'communication_fraction'):.2f} %",
            ]
        )
    head = ["recipe", "peak rate", "MB a step", "peak", "below bf16 DDP", "loss", "to exact", "seeds", "communication"]
    return _table(head, lines)


def _projection_table(rows: Sequence[Row]) -> str:
    """Of exchanges of weights between two GPUs, each with the settings that ended lowest."""
    measured = [row for row in rows if (row["device"], row["ranks"]) == ("cuda", 2) and row["local_steps"] > 1]
    lines = []
    for own in _grouped(measured, ("architecture", "codec", "local_steps")).values():
        best = min(_grouped(own, RECIPE).values(), key=lambda runs: _mean(runs, "loss"))
        for ranks in RANKS:
            there = [project(row, ranks) for row in best]
            lines.append(
                [
                    best[0]["architecture"].title(),
                    _describe(best[0]),
                    f"{ranks:,}",
                    f"{_mean(there, 'bytes_per_step') / 1e6:.3g}",
                    f"{_mean(there, 'communication_ms'):.3g}",
                    f"{100 * _mean(there, 'of_step_now'):.3g} %",
                ]
            )
    return _table(["model", "recipe", "ranks", "MB a step", "ms", "of a step as between two"], lines)


def _describe(settings: Row) -> str:
    text: str = settings["codec"]
    if settings["local_steps"] > 1:
        text += f", {settings['local_steps']} local, outer {settings['outer_rate']:g} / {settings['outer_momentum']:g}"
    if settings["optimizer"] != "AdamW":
        text += f", {settings['optimizer']}"
    if settings["beta2"]:
        text += f", beta2 {settings['beta2']:g}"
    return text + (", by sign" if settings["beta2"] == 0 else "")


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    cells = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def _grouped(rows: Sequence[Row], names: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def _mean(rows: Sequence[Row], name: str) -> float:
    return statistics.mean(row[name] for row in rows)


if __name__ == "__main__":
    main()
