"""Quality of Resonate, Mamba-2 and a Transformer of equal size, at equal tokens and at equal time, and their recall.

    python benchmarks/gate_quality.py --prepare               # once: the corpus, minutes on a CPU
    python benchmarks/resonate_quality.py                     # the core table; adds to the results that are there
    python benchmarks/resonate_quality.py --only "resonate: long convolution"
    python benchmarks/resonate_quality.py --small --device cpu --steps 200

Text is Python sources (python_corpus.py), recall is MQAR (recall.py). Runs of a seed see the same data in the same
order. Budgets of text: `tokens`, the same for all; `seconds`, those that the Transformer of the seed took for its
tokens, each run with a whole schedule of its own (quality_runs.py); `0.8 tokens`. The peak learning rate of a variant
is the best of its short list by the held-out loss of one run of seed 1000, a quarter as long; for recall, by seed 0.
Clocks leave out evaluation; those of text leave out compilation too.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gate_quality import CORPUS, COSINE
from measure import RESULTS, device_name, print_table, read_rows, write_results
from python_corpus import VOCABULARY, read_corpus
from quality_runs import Laboratory, Outcome, Phase, Scale, Strategy
from recall import Task, train
from resonate_table import SHARE, name_of, summarise
from resonate_variants import CORE, LARGE, SMALL, VARIANTS, Shape, Variant

from pylon_api.training import Compile

BASELINE = "transformer"
BUDGETS = ("tokens", "seconds", SHARE)
RATE_SEED = 1000
RATE_SHARE = 0.25
RECALL_RATES = (1e-3, 4e-3)
TASKS = {
    "cuda": Task(Shape({"hidden_size": 128, "heads": 4}, SMALL.layers), 2048, 256, (8, 32, 64), 128, 3000),
    "cpu": Task(SMALL, 128, 64, (4, 8, 16), 32, 400),
}


class Study:
    """All runs, in an order that leaves whole seeds behind when it must end early."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._device = torch.device(arguments.device)
        self._end_s = time.monotonic() + 60 * arguments.minutes
        self.rows = read_rows("resonate_quality", arguments.results)
        self.failures: list[str] = []

    def compare_text(self, variants: list[Variant]) -> None:
        """Losses on held-out sources."""
        arguments = self._arguments
        shape = SMALL if arguments.small else LARGE
        scale = Scale({}, sequences=8, tokens=128) if arguments.small else Scale({}, sequences=64, tokens=512)
        corpus = {k: ids for k, ids in read_corpus(arguments.corpus).items() if k.startswith("python")}
        laboratories: dict[str, Laboratory] = {}
        rates: dict[str, float] = {}

        def prepare(variant: Variant) -> None:
            build = partial(variant.build, shape, VOCABULARY)
            laboratory = Laboratory(scale, corpus, self._device, arguments.compile, build)
            step_s = laboratory.prepare(Strategy("plain", optimizer=variant.optimizer_spec()), "python")
            tokens_per_s = scale.sequences * scale.tokens / step_s
            rates[variant.name] = self._best_rate(laboratory, variant)
            laboratories[variant.name] = laboratory
            print(f"{variant.name}: {tokens_per_s:,.0f} tokens/s, rate {rates[variant.name]}", flush=True)

        def run(variant: Variant, seed: int, budget: str) -> None:
            laboratory = laboratories[variant.name]
            seconds = seconds_of.get(seed, math.nan)
            steps = {"tokens": arguments.steps, SHARE: round(0.8 * arguments.steps)}.get(budget)
            outcome = self._train(laboratory, variant, rates[variant.name], seed, seconds, steps)
            if variant.name == BASELINE and budget == "tokens":
                seconds_of[seed] = outcome.seconds
            parameters = sum(parameter.numel() for parameter in laboratory.model.parameters())
            self._keep(
                variant,
                "text",
                budget,
                seed,
                parameters=parameters,
                tokens=outcome.tokens,
                seconds=outcome.seconds,
                loss=outcome.loss,
                learning_rate=rates[variant.name],
            )

        ready = [variant for variant in variants if self._survives(variant.name, partial(prepare, variant))]
        seconds_of = {row["seed"]: row["seconds"] for row in self._own_rows("text") if name_of(row) == BASELINE}
        for seed in range(arguments.seeds):
            for variant in ready:
                for budget in arguments.budgets:
                    if budget == "seconds" and (variant.name == BASELINE or seed not in seconds_of):
                        continue
                    if budget == SHARE and variant.architecture != "resonate":
                        continue
                    self._survives(f"{variant.name}, seed {seed}, {budget}", partial(run, variant, seed, budget))

    def _best_rate(self, laboratory: Laboratory, variant: Variant) -> float:
        given = self._arguments.learning_rate
        rates = [given] if given else list(variant.rates)
        if len(rates) == 1:
            return rates[0]
        steps = max(1, round(RATE_SHARE * self._arguments.steps))
        losses = {rate: self._train(laboratory, variant, rate, RATE_SEED, math.nan, steps).loss for rate in rates}
        print(f"{variant.name}: " + ", ".join(f"{rate}: {loss:.4f}" for rate, loss in losses.items()), flush=True)
        return min(losses, key=losses.__getitem__)

    def _train(
        self, laboratory: Laboratory, variant: Variant, rate: float, seed: int, seconds: float, steps: int | None
    ) -> Outcome:
        phase = Phase("scratch", "python", seconds, rate, COSINE)
        return laboratory.train(
            Strategy("plain", optimizer=variant.optimizer_spec()), phase, seed, laboratory.start(seed), steps
        )[0]

    def compare_recall(self, variants: list[Variant]) -> None:
        """Right answers by number of pairs."""
        task = TASKS["cpu" if self._arguments.small else "cuda"]
        compile, rates = self._arguments.compile, dict[str, float]()

        def run(variant: Variant, seed: int) -> None:
            tried = [rates[variant.name]] if variant.name in rates else RECALL_RATES
            found = {rate: train(variant, task, rate, seed, self._device, compile) for rate in tried}
            rate = max(found, key=lambda rate: sum(found[rate].recall.values()))
            rates[variant.name], result = rate, found[rate]
            for pairs in task.pairs:
                self._keep(
                    variant,
                    "recall",
                    f"{pairs} pairs",
                    seed,
                    parameters=result.parameters,
                    tokens=task.steps * task.sequences * task.tokens,
                    seconds=result.seconds,
                    loss=result.loss[pairs],
                    recall=result.recall[pairs],
                    learning_rate=rate,
                )

        for seed in range(self._arguments.seeds):
            for variant in variants:
                self._survives(f"{variant.name}, recall, seed {seed}", partial(run, variant, seed))

    def _survives(self, what: str, work: Callable[[], None]) -> bool:
        """Whether it was done; whatever one kind dies of must not cost the others' runs."""
        if time.monotonic() > self._end_s:
            self.failures.append(f"{what}: out of time")
            return False
        try:
            work()
        except Exception:
            print(f"{what} failed:\n{traceback.format_exc()}", flush=True)
            self.failures.append(what)
            return False
        return True

    def _keep(self, variant: Variant, task: str, budget: str, seed: int, **figures: Any) -> None:
        """Write a row, in the place of an older one of its kind."""
        row = {
            "architecture": variant.architecture,
            "ablation": variant.ablation,
            "task": task,
            "budget": budget,
            "device": device_name(),
            "seed": seed,
            "recall": None,
        } | figures
        key = ("architecture", "ablation", "task", "budget", "device", "seed")
        self.rows = [old for old in self.rows if any(old[k] != row[k] for k in key)] + [row]
        write_results("resonate_quality", self.rows, self._arguments.results)
        recall = "" if row["recall"] is None else f", recall {row['recall']:.3f}"
        print(
            f"{task}, {budget}, seed {seed}, {variant.name}: {row['loss']:.4f}{recall}, {row['tokens']:,} tokens in "
            f"{row['seconds']:.1f} s",
            flush=True,
        )

    def _own_rows(self, task: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if (row["task"], row["device"]) == (task, device_name())]


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the quality of architectures of equal size.")
    parser.add_argument("--only", choices=list(VARIANTS), action="append", help="default: the core table")
    parser.add_argument("--task", choices=["text", "recall"], action="append", help="default: both")
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300, help="of a run of equal tokens (default 300)")
    parser.add_argument("--learning-rate", type=float, help="for all; default: the best of each variant's list")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after them")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--compile", choices=list(Compile), type=Compile, help="default: Default on CUDA, else Disabled"
    )
    parser.add_argument("--small", action="store_true", help="toy models, for CPUs")
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="file with the corpus")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory for the JSON file")
    arguments = parser.parse_args()
    tasks = arguments.task or ["text", "recall"]
    if "text" in tasks and not arguments.corpus.exists():
        parser.error(f"--corpus: {arguments.corpus} is not there; write it with gate_quality.py --prepare")
    arguments.compile = arguments.compile or (Compile.DEFAULT if arguments.device == "cuda" else Compile.OFF)
    torch._dynamo.config.recompile_limit = 64  # variants share code, and each is another specialisation of it
    study = Study(arguments)
    variants = [VARIANTS[name] for name in VARIANTS if name in (arguments.only or CORE)]
    if "text" in tasks:
        study.compare_text(variants)
    if "recall" in tasks:
        study.compare_recall(variants)
    if study.rows:
        print_table(summarise(study.rows))
    if study.failures:
        print(f"failed: {'; '.join(study.failures)}", file=sys.stderr)
    return 1 if study.failures else 0


if __name__ == "__main__":
    sys.exit(main())
