"""The benchmark of Resonate's quality: its runs on a toy, the recall task and the table."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quality_runs
import recall
import resonate_quality
import torch
from resonate_table import SHARE, SPEED, difference, summarise
from resonate_variants import LARGE, SMALL, VARIANTS, Variant

from pylon_api.training import Compile
from pylon_trainer.step import IGNORED

TASK = recall.Task(SMALL, vocabulary=32, tokens=32, pairs=(2, 4), sequences=16, steps=2)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["resonate_quality.py", *map(str, arguments)])
    return resonate_quality.main()


@pytest.mark.slow
def test_every_variant_meets_every_budget_and_the_recall_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_runs, "ROUND_STEPS", 2)
    monkeypatch.setattr(quality_runs, "WARM_STEPS", 2)
    monkeypatch.setattr(resonate_quality, "SPEED_STEPS", 2)
    monkeypatch.setitem(resonate_quality.TASKS, "small", TASK)
    ids = np.random.default_rng(0).integers(0, 200, 8000).astype(np.uint16)
    np.savez(tmp_path / "corpus.npz", python_train=ids, python_held_out=ids[:1100])
    variants = [word for name in ("transformer", "mamba2", "resonate: attention") for word in ("--only", name)]
    toy = ["--small", "--device", "cpu", "--steps", 5, "--seeds", 1, "--learning-rate", 3e-3]
    assert run(monkeypatch, *toy, *variants, "--corpus", tmp_path / "corpus.npz", "--results", tmp_path) == 0
    rows = json.loads((tmp_path / "resonate_quality.json").read_text())["rows"]
    assert [(row["architecture"], row["task"], row["budget"]) for row in rows] == [
        ("transformer", "text", "tokens"),
        ("transformer", "text", SPEED),
        ("mamba2", "text", "tokens"),
        ("mamba2", "text", "seconds"),
        ("mamba2", "text", SPEED),
        ("resonate", "text", "tokens"),
        ("resonate", "text", "seconds"),
        ("resonate", "text", SHARE),
        ("resonate", "text", SPEED),
        *(
            (name, "recall", budget)
            for name in ("transformer", "mamba2", "resonate")
            for budget in ("2 pairs", "4 pairs")
        ),
    ]
    assert rows[7]["tokens"] == 0.8 * rows[5]["tokens"] == 0.8 * rows[0]["tokens"]
    assert all(0 < row["loss"] < 12 for row in rows)
    assert all((row["recall"] is None) == (row["task"] == "text") for row in rows)
    again = [*toy, "--only", "transformer", "--task", "text", "--steps", 3, "--corpus", tmp_path / "corpus.npz"]
    assert run(monkeypatch, *again, "--results", tmp_path) == 0
    after = json.loads((tmp_path / "resonate_quality.json").read_text())["rows"]
    assert len(after) == len(rows)
    assert after[-2]["tokens"] == 0.6 * rows[0]["tokens"], "a run takes the place of the older one of its kind"


def test_a_missing_corpus_says_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--corpus", tmp_path / "none.npz")
    assert "--prepare" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [LARGE, SMALL])
def test_variants_have_about_as_many_parameters(shape: Any) -> None:
    with torch.device("meta"):
        counts = {
            name: sum(parameter.numel() for parameter in variant.build(shape, 8192).parameters())
            for name, variant in VARIANTS.items()
            if not {"adaptation", "control"} & variant.resonate.keys()  # which are there to have fewer, and ports
        }
    assert max(counts.values()) < 1.07 * counts["transformer"], counts
    assert min(counts.values()) > 0.93 * counts["transformer"], counts


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda variant: variant.name)
def test_every_variant_can_be_trained(variant: Variant) -> None:
    task = replace(TASK, steps=1, sequences=2)
    result = recall.train(variant, task, variant.rates[0], 0, torch.device("cpu"), Compile.OFF)
    assert all(math.isfinite(loss) for loss in result.loss.values())


@pytest.mark.parametrize(
    ("best", "tried"),
    [(3, {2, 3, 4}), (1, {0, 1, 2, 3}), (0, {0, 1, 2, 3}), (5, {2, 3, 4, 5, 6}), (6, {2, 3, 4, 5, 6})],
)
def test_the_learning_rate_is_looked_for_from_the_middle_on(best: int, tried: set[int]) -> None:
    rates = [2.0**n for n in range(7)]
    rate, losses = resonate_quality.lowest(rates, lambda rate: abs(math.log2(rate) - best))
    assert rate == rates[best]
    assert set(losses) == {rates[n] for n in tried}


@pytest.mark.parametrize(("rates", "best"), [([1.0, 2.0, 3.0], 1.0), ([3.0, 4.0, 5.0], 3.0), ([0.5, 1.0, 5.0], 1.0)])
def test_learning_rates_that_end_in_no_number_are_not_taken(rates: list[float], best: float) -> None:
    rate, _ = resonate_quality.lowest(rates, lambda rate: math.nan if rate > 3.5 else -rate if rate < 2 else 0.0)
    assert rate == best


def test_a_query_is_asked_once_for_each_pair_and_labelled_with_its_value() -> None:
    batch = recall.draw(TASK, 4, torch.Generator().manual_seed(0))
    assert batch.tokens_BT.shape == batch.labels_BT.shape == (16, 32)
    for tokens, labels in zip(batch.tokens_BT.tolist(), batch.labels_BT.tolist(), strict=True):
        told = dict(zip(tokens[:8:2], tokens[1:8:2], strict=True))
        assert len(told) == 4, "keys are distinct"
        asked = {tokens[place]: label for place, label in enumerate(labels) if label != IGNORED}
        assert asked == told
        assert all(tokens[place + 1] == label for place, label in enumerate(labels) if label != IGNORED)


def test_pairs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="9 pairs do not fit 32 tokens"):
        replace(TASK, pairs=(9,))


@pytest.mark.slow
def test_attention_learns_to_recall() -> None:
    task = replace(TASK, vocabulary=16, tokens=16, pairs=(2,), sequences=64, steps=250)
    result = recall.train(VARIANTS["transformer"], task, 1e-2, 0, torch.device("cpu"), Compile.OFF)
    assert result.recall[2] > 0.5, "a guess among the values has 0.125"


def text_rows(losses: dict[tuple[str, str], list[float]]) -> list[dict[str, Any]]:
    """Rows by variant and budget, one for each seed."""
    return [
        {
            "architecture": name.partition(": ")[0],
            "ablation": name.partition(": ")[2],
            "task": "text",
            "budget": budget,
            "device": "cpu",
            "compile": "Disabled",
            "seed": seed,
            "parameters": 10,
            "tokens": 80 if budget == SHARE else 100,
            "seconds": 1.0,
            "loss": loss,
            "recall": None,
        }
        for (name, budget), by_seed in losses.items()
        for seed, loss in enumerate(by_seed)
    ]


ROWS = text_rows(
    {
        ("transformer", "tokens"): [2.0, 3.0, 2.5],
        ("mamba2", "tokens"): [2.2, 3.2, 2.6],
        ("mamba2", "seconds"): [2.4, 3.4],
        ("resonate", "tokens"): [1.9, 2.91, 2.42],
        ("resonate", "seconds"): [2.0, 3.01, 2.49],
        ("resonate: attention", SHARE): [2.5],
    }
)


@pytest.mark.parametrize(
    ("variant", "rival", "budget", "mean", "seeds", "verdict"),
    [
        ("resonate", "transformer", "tokens", -0.09, 3, "better"),
        ("resonate", "transformer", "seconds", 0.0, 3, "equal"),
        ("resonate", "mamba2", "seconds", -0.395, 2, "better"),
        ("mamba2", "transformer", "tokens", 0.1667, 3, "worse"),
        ("resonate: attention", "transformer", SHARE, 0.5, 1, "one seed"),
    ],
)
def test_losses_are_compared_seed_by_seed(
    variant: str, rival: str, budget: str, mean: float, seeds: int, verdict: str
) -> None:
    found = difference(ROWS, variant, rival, budget)
    assert found is not None
    assert found.mean == pytest.approx(mean, abs=1e-4)
    assert (found.seeds, found.verdict) == (seeds, verdict)
    assert math.isnan(found.error) == (seeds == 1)


def test_what_was_not_run_is_not_compared() -> None:
    assert difference(ROWS, "resonate", "transformer", SHARE) is None
    longer = [row | {"tokens": 200} if row["architecture"] == "transformer" else row for row in ROWS]
    assert difference(longer, "resonate", "transformer", "tokens") is None
    (line,) = [line for line in summarise(ROWS) if line["variant"] == "resonate: attention"]
    assert line["to transformer"].endswith("one seed")
