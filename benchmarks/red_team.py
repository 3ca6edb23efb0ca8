"""Every claim about Resonate beside its goal, what was measured and the verdict: losses as well as wins.

    python benchmarks/red_team.py                            # from the results that are there
    python benchmarks/red_team.py --rerun                    # measures first; hours, and GPUs for most of it
    python benchmarks/red_team.py --write docs/resonate.md   # puts the tables into the document

It judges files of results and measures nothing itself. A claim without a measurement on an accelerator is "not
measured", whatever a toy on CPUs says; the lower tables show every device.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import RESULTS
from red_team_claims import CONSENSUS, FIELDS, QUALITY, ablations, judge, recipes

SCRIPTS = ("resonate_throughput.py", "resonate_quality.py", "consensus.py")
BEGIN, END = "<!-- begin: benchmarks/red_team.py -->", "<!-- end: benchmarks/red_team.py -->"


class BadResults(Exception):
    """A file of results that cannot be judged. Its text names the file and what to do."""


def main() -> int:
    """The command line. Exit status 1 for results that cannot be read, or scripts that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the JSON files")
    parser.add_argument("--rerun", action="store_true", help=f"run {', '.join(SCRIPTS)} first")
    parser.add_argument("--write", type=Path, metavar="DOCUMENT", help=f"put the tables between its lines {BEGIN}")
    arguments = parser.parse_args()
    failed = [script for script in SCRIPTS if arguments.rerun and not rerun(script, arguments.results)]
    try:
        text = report({name: read(arguments.results, name) for name in FIELDS})
        if arguments.write:
            arguments.write.write_text(replaced(arguments.write, text))
        else:
            print(text)
    except (BadResults, OSError) as error:
        print(f"red_team.py: {error}", file=sys.stderr)
        return 1
    if failed:
        print(f"red_team.py: failed, so older results were judged: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def rerun(script: str, results: Path) -> bool:
    """Whether it ended well."""
    command = [sys.executable, str(Path(__file__).with_name(script)), "--results", str(results)]
    print(" ".join(command), flush=True)
    return subprocess.run(command).returncode == 0


def read(directory: Path, name: str) -> list[dict[str, Any]]:
    """Rows of a file, none when it is not there. BadResults when it is no file of results."""
    path = directory / f"{name}.json"
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())["rows"]
        lacking = [(n, field) for n, row in enumerate(rows) for field in FIELDS[name] if field not in row]
    except (ValueError, KeyError, TypeError) as error:
        raise BadResults(f"{path}: no file of results ({type(error).__name__}: {error}); measure anew") from error
    if lacking:
        number, field = lacking[0]
        raise BadResults(f"{path}: row {number} lacks {field!r}; remove the row or measure anew")
    return list(rows)


def report(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """All tables, as Markdown."""
    lines = judge(results)
    counts = {
        verdict: sum(line["verdict"] == verdict for line in lines) for verdict in ("met", "missed", "not measured")
    }
    parts = [
        f"Of {len(lines)} claims " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + ".",
        table(lines),
    ]
    for title, rows in (
        (
            "What parts of Resonate add, beside a trunk that never attends (loss in nats a token; negative is better):",
            ablations(results[QUALITY]),
        ),
        ("Ways to exchange gradients:", recipes(results[CONSENSUS])),
    ):
        if rows:
            parts += [title, table(rows)]
    return "\n\n".join(parts)


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Markdown, columns as wide as their cells."""
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    padded = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    return "\n".join([padded[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *padded[1:]])


def replaced(document: Path, text: str) -> str:
    """The document with the text between its two marks. BadResults when it lacks them."""
    old = document.read_text()
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise BadResults(f"{document}: needs the lines {BEGIN} and {END} to put the tables between")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


if __name__ == "__main__":
    sys.exit(main())
