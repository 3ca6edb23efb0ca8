"""The tables of docs/consensus.md, from what consensus.py has measured.

python benchmarks/consensus_table.py            # prints them
python benchmarks/consensus_table.py --write    # puts them between the marks in docs/consensus.md
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from consensus_projection import RANKS, project
from consensus_recipes import Row, above_exact, by_recipe, grouped, mean, recipe_name
from measure import RESULTS, read_rows

PAGE = Path(__file__).parents[1] / "docs" / "consensus.md"
TABLE = ("device", "ranks", "architecture", "parameters", "steps", "tokens")
"""What runs of a table have in common."""
BEGIN, END = "<!-- begin: benchmarks/consensus_table.py -->\n", "<!-- end: benchmarks/consensus_table.py -->\n"


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
    for group in grouped(rows, TABLE):
        device, ranks, architecture, parameters, steps, tokens = (group[0][name] for name in TABLE)
        where = f"{ranks} H200, NCCL" if device == "cuda" else f"{ranks} processes, gloo"
        model = f"{architecture.title()} of {parameters / 1e6:.1f}M parameters"
        title = f"**{where}, {model}, {steps} steps of {tokens // steps:,} tokens**"
        parts.append(f"{title}\n\n{_runs_table(group)}")
    parts.append(f"**Projection, not measured**\n\n{_projection_table(rows)}")
    return "\n" + "\n".join(parts) + "\n"


def _runs_table(rows: Sequence[Row]) -> str:
    lines = []
    for own in by_recipe(rows):
        above = above_exact(own)
        lines.append(
            [
                recipe_name(own[0]),
                f"{own[0]['learning_rate']:.2g}",
                f"{mean(own, 'bytes_per_step_mean') / 1e6:.3g}",
                f"{mean(own, 'bytes_per_step_peak') / 1e6:.3g}",
                f"{mean(own, 'below_bf16_ddp'):.3g}x",
                f"{mean(own, 'loss'):.4f}",
                f"{100 * above:+.2f} %" if above else "",
                str(len(own)),
                f"{100 * mean(own, 'communication_fraction'):.2f} %",
            ]
        )
    head = ["recipe", "peak rate", "MB a step", "peak", "below bf16 DDP", "loss", "to exact", "seeds", "communication"]
    return _table(head, lines)


def _projection_table(rows: Sequence[Row]) -> str:
    """Of exchanges of weights between two GPUs, each with the settings that ended lowest."""
    measured = [row for row in rows if (row["device"], row["ranks"]) == ("cuda", 2) and row["local_steps"] > 1]
    lines = []
    for own in grouped(measured, ("architecture", "codec", "local_steps")):
        best = min(by_recipe(own), key=lambda runs: mean(runs, "loss"))
        for ranks in RANKS:
            there = [project(row, ranks) for row in best]
            lines.append(
                [
                    recipe_name(best[0]),
                    f"{ranks:,}",
                    f"{mean(there, 'bytes_per_step') / 1e6:.3g}",
                    f"{mean(there, 'communication_ms'):.3g}",
                    f"{100 * mean(there, 'of_step_now'):.3g} %",
                ]
            )
    return _table(["recipe", "ranks", "MB a step", "ms", "of a step as between two"], lines)


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    cells = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


if __name__ == "__main__":
    main()
