"""The table of claims, on made-up results: verdicts, gaps, files that are damaged, and the document that shows it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import red_team
import red_team_claims
from red_team_claims import CLAIMS, CONSENSUS, FIELDS, QUALITY, THROUGHPUT, judge
from red_team_measures import RESONATE
from resonate_table import SPEED

ROOT = Path(__file__).parents[2]


def throughput(architecture: str, tokens_per_s: float, sequence: int = 8192, gib: float | None = 1.0) -> dict[str, Any]:
    row = {"architecture": architecture, "device": "H200", "sequence": sequence, "recompute": "Mixers"}
    return row | {"tokens_per_s": tokens_per_s, "activation_gib": gib}


def quality(name: str, loss: float, *, budget: str = "tokens", seed: int = 0, device: str = "H200") -> dict[str, Any]:
    architecture, _, ablation = name.partition(": ")
    row = {"architecture": architecture, "ablation": ablation, "task": "text", "budget": budget, "device": device}
    row |= {"compile": "Graph"}
    return row | {"parameters": 30_000_000, "seed": seed, "tokens": 100, "seconds": 1, "loss": loss, "recall": None}


def recalled(name: str, recall: float, budget: str = "8 pairs") -> dict[str, Any]:
    return quality(name, 1.0, budget=budget) | {"task": "recall", "recall": recall}


def exchange(codec: str, bytes_per_step: float, above_exact: float | None, **fields: Any) -> dict[str, Any]:
    row = {"codec": codec, "ranks": 2, "device": "cuda", "parameters": 64_000_000, "is_exact": codec == "Exact"}
    row |= {"bytes_per_step_mean": bytes_per_step, "bytes_per_step_peak": bytes_per_step * 2, "seed": 0}
    row |= {"below_bf16_ddp": 128e6 / bytes_per_step, "above_exact": above_exact, "communication_fraction": 0.005}
    row |= {"learning_rate": 1e-3, "step_ms": 40.0, "channels": f"matrices {codec}"}
    return row | fields


RECOMPUTED = [
    throughput("transformer", 1, gib=4.0),
    *(throughput(name, 1) | {"recompute": "Blocks"} for name in ("transformer", RESONATE)),
]


def verdicts(**results: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Verdict and measured figure of each claim by its text."""
    return {line["claim"]: (line["verdict"], line["measured"]) for line in judge(results)}


AT_8K = "Throughput, as a multiple of the Transformer's, 8,192 tokens"
AT_32K = "Throughput, as a multiple of the Transformer's, 32,768 tokens"
TO_MAMBA = "Throughput, as a multiple of plain Mamba-2's, at worst"
ACTIVATIONS = "Peak activations, as a multiple of the Transformer's, at worst"
BOTH_RECOMPUTE = "The same, both recomputing whole blocks"
ONE_RECOMPUTES = "The same, Resonate alone recomputing them"
LOSS = "Without attention: loss beyond the Transformer's, equal tokens"
RECALL = "Without attention: right answers beyond the Transformer's (MQAR)"
BYTES = "Bytes of a step and rank, all in, mean"
ABOVE_EXACT = "Loss above the exact sum's"


@pytest.mark.parametrize(
    ("claim", "verdict", "measured", "rows"),
    [
        (AT_8K, "met", "1.20x", [throughput("transformer", 100), throughput(RESONATE, 120)]),
        (AT_8K, "missed", "1.19x", [throughput("transformer", 100), throughput(RESONATE, 119)]),
        (
            AT_8K,
            "met",
            "1.50x",
            [throughput("transformer", 100), throughput(RESONATE, 90), throughput(RESONATE, 150)],
        ),
        (AT_8K, "not measured", "", [throughput("transformer", 100)]),
        (AT_32K, "not measured", "", [throughput("transformer", 100), throughput(RESONATE, 120)]),
        (
            TO_MAMBA,
            "missed",
            "0.50x",
            [
                *(throughput("mamba2", 100, n) for n in (8192, 32768)),
                throughput(RESONATE, 200),
                throughput(RESONATE, 50, 32768),
            ],
        ),
        (ACTIVATIONS, "met", "0.25x", [throughput("transformer", 1, gib=4.0), throughput(RESONATE, 1)]),
        (ACTIVATIONS, "missed", "0.50x", [*RECOMPUTED, throughput(RESONATE, 1, gib=2.0)]),
        (BOTH_RECOMPUTE, "missed", "1.00x", RECOMPUTED),
        (ONE_RECOMPUTES, "met", "0.25x", RECOMPUTED),
        (
            ACTIVATIONS,
            "not measured",
            "",
            [throughput("transformer", 1, gib=None), throughput(RESONATE, 1, gib=None)],
        ),
    ],
)
def test_throughput(claim: str, verdict: str, measured: str, rows: list[dict[str, Any]]) -> None:
    found = verdicts(**{THROUGHPUT: rows})[claim]
    assert (found[0], found[1].partition(" ")[0]) == (verdict, measured)


@pytest.mark.parametrize(
    ("claim", "verdict", "measured", "rows"),
    [
        (LOSS, "met", "-0.1000 (one seed)", [quality("transformer", 2.0), quality("resonate", 1.9)]),
        (LOSS, "missed", "+0.0010 (one seed)", [quality("transformer", 2.0), quality("resonate", 2.001)]),
        (
            LOSS,
            "met",
            "-0.2000 (± 0.1000, 2 seeds)",
            [
                quality(name, loss, seed=seed)
                for seed in (0, 1)
                for name, loss in (("transformer", 2.0), ("resonate", 1.7 + seed / 5))
            ],
        ),
        (LOSS, "not measured", "", [quality("transformer", 2.0, device="cpu"), quality("resonate", 1.9, device="cpu")]),
        (LOSS, "not measured", "", [quality("transformer", 2.0, seed=1), quality("resonate", 1.9)]),
        (RECALL, "met", "-0.4% (99.0% against 99.4%)", [recalled("transformer", 0.994), recalled("resonate", 0.99)]),
        (RECALL, "missed", "-50.0% (50.0% against 100.0%)", [recalled("transformer", 1.0), recalled("resonate", 0.5)]),
    ],
)
def test_quality(claim: str, verdict: str, measured: str, rows: list[dict[str, Any]]) -> None:
    assert verdicts(**{QUALITY: rows})[claim] == (verdict, measured)


@pytest.mark.parametrize(
    ("rows", "of_bytes", "of_loss"),
    [
        ([exchange("Exact", 128e6, 0.0)], ("not measured", ""), ("not measured", "")),
        ([exchange("Dct", 1e6, 0.002, parameters=600_000)], ("not measured", ""), ("not measured", "")),
        ([exchange("Dct", 1e6, 0.002, device="cpu")], ("not measured", ""), ("not measured", "")),
        (
            [exchange("Dct", 1e6, 0.05), exchange("Int4", 1.2e6, 0.002, local_steps=32), exchange("Int8", 64e6, 0.0)],
            ("met", "1,200,000 (Int4, localSteps 32, seeds: 1)"),
            ("met", "0.20% (Int4, localSteps 32, seeds: 1)"),
        ),
        (
            [exchange("Sign", 1e6, None, optimizer="Muon"), exchange("Sign", 1e6, 0.002, optimizer="Lion")],
            ("met", "1,000,000 (Sign, Lion, seeds: 1)"),
            ("met", "0.20% (Sign, Lion, seeds: 1)"),
        ),
        (
            [exchange("Int8", 64e6, 0.0), exchange("Int4", 32e6, 0.0)],
            ("missed", "32,000,000 (Int4, seeds: 1)"),
            ("met", "0.00% (Int4, seeds: 1)"),
        ),
    ],
)
def test_one_recipe_must_meet_all_claims_of_consensus_at_once(
    rows: list[dict[str, Any]], of_bytes: tuple[str, str], of_loss: tuple[str, str]
) -> None:
    found = verdicts(**{CONSENSUS: rows})
    assert (found[BYTES], found[ABOVE_EXACT]) == (of_bytes, of_loss)


def test_exchanges_are_listed_by_recipe_over_their_seeds() -> None:
    runs = [
        exchange("Int4", 1e6, above, local_steps=8, outer_rate=rate, seed=seed)
        for rate, seed, above in ((0.7, 0, 0.1), (0.7, 1, 0.2), (1.0, 0, 0.3))
    ]
    alone = [exchange("Sign", 2e6, None, optimizer="Muon", seed=seed) for seed in (0, 1)]
    lines = red_team_claims.recipes([*runs, *alone, exchange("Exact", 128e6, 0.0)])
    assert [(line["exchange"], line["above exact"], line["seeds"]) for line in lines] == [
        ("Int4, localSteps 8, outer 0.7", "+15.00%", "2"),
        ("Int4, localSteps 8, outer 1", "+30.00%", "1"),
        ("Sign, Muon", "", "2"),
        ("Exact", "+0.00%", "1"),
    ]


def test_a_projection_is_called_one() -> None:
    lines = [line for line in judge({CONSENSUS: [exchange("Sign", 1e6, 0.0)]}) if line["hardware"] == "projection"]
    assert [line["verdict"] for line in lines] == ["met", "missed", "missed"]
    assert all("arithmetic" in line["measured"] for line in lines)


def test_parts_are_shown_with_what_they_cost() -> None:
    rows = [quality("resonate", 2.0), quality("resonate: Binlop", 2.1), quality("resonate", 3.0, device="cpu")]
    rows += [
        quality(name, 4.0, budget=SPEED) | {"seconds": s} for name, s in (("resonate", 2), ("resonate: Binlop", 3))
    ]
    (line,) = red_team_claims.ablations(rows)
    assert (line["part"], line["device"]) == ("Binlop", "H200")
    assert line["loss, equal tokens"] == "+0.1000 (one seed)"
    assert line["time of a step"] == "1.50x"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["red_team.py", *map(str, arguments)])
    return red_team.main()


def write(directory: Path, name: str, rows: Any) -> None:
    (directory / f"{name}.json").write_text(json.dumps({"environment": {}, "rows": rows}))


def test_without_results_every_claim_is_there_and_none_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--results", tmp_path) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"Of {len(CLAIMS)} claims 0 met, 0 missed, {len(CLAIMS)} not measured.")
    assert shown.count("| not measured |") == len(CLAIMS)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "consensus.json: no file of results (JSONDecodeError: "),
        ("[]", "consensus.json: no file of results (TypeError: "),
        ('{"rows": [{"codec": "Dct"}]}', "consensus.json: row 0 lacks 'ranks'; remove the row or measure anew"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(
    content: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "consensus.json").write_text(content)
    assert run(monkeypatch, "--results", tmp_path) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err
    assert len(printed.err.splitlines()) == 1


def test_the_tables_go_between_the_marks_of_a_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, THROUGHPUT, [throughput("transformer", 100), throughput(RESONATE, 120)])
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{red_team.BEGIN}\nold\n{red_team.END}\n\n## More\n")
    for _ in range(2):
        assert run(monkeypatch, "--results", tmp_path, "--write", page) == 0
    assert page.read_text().startswith(f"# Title\n\n{red_team.BEGIN}\n\nOf {len(CLAIMS)} claims 1 met")
    assert page.read_text().endswith(f"{red_team.END}\n\n## More\n")
    assert "old" not in page.read_text()
    page.write_text("# Title\n")
    assert run(monkeypatch, "--results", tmp_path, "--write", page) == 1
    assert "page.md: needs the lines <!-- begin" in capsys.readouterr().err
    assert page.read_text() == "# Title\n"


def test_a_script_that_fails_is_named_and_older_results_are_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.py").write_text("import sys; assert sys.argv[1] == '--results'")
    (tmp_path / "bad.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(red_team, "__file__", str(tmp_path / "red_team.py"))
    monkeypatch.setattr(red_team, "SCRIPTS", ("good.py", "bad.py"))
    assert run(monkeypatch, "--results", tmp_path, "--rerun") == 1
    printed = capsys.readouterr()
    assert "claims 0 met" in printed.out
    assert printed.err == "red_team.py: failed, so older results were judged: bad.py\n"


def test_the_document_shows_the_results_that_are_there() -> None:
    results = {name: red_team.read(red_team.RESULTS, name) for name in FIELDS}
    page = ROOT / "docs" / "resonate.md"
    assert page.read_text() == red_team.replaced(page, red_team.report(results)), (
        f"run: {Path(sys.executable).name} benchmarks/red_team.py --write docs/resonate.md"
    )
