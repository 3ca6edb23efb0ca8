"""Quality of Resonate, Mamba-2 and a Transformer of equal size, at equal tokens and at equal time, and their recall.

    python benchmarks/gate_quality.py --prepare               # once: the corpus, minutes on a CPU
    python benchmarks/resonate_quality.py                     # the core table; adds to the results that are there
    python benchmarks/resonate_quality.py --only "resonate: long convolution"
    python benchmarks/resonate_quality.py --small --device cpu --steps 200

Text is Python sources (python_corpus.py), recall is MQAR (recall.py). Runs of a seed see the same data in the same
order. Budgets of text: `tokens`, the same for all; `seconds`, those that the Transformer of the seed took for its
tokens, each run with a whole schedule of its own (quality_runs.py); `0.8 tokens`; `speed`, a few steps to time them. A
tenth of a run is warm-up. The peak learning rate of a variant is where the held-out loss of runs of seed 1000, a
quarter as long, is lowest: from the middle of its list they go down or up as long as that helps; for recall likewise,
by the answers of whole runs of seed 0. Clocks leave out evaluation; those of text leave out compilation too.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from gate_quality import CORPUS
from measure import RESULTS, device_name, print_table, read_rows, write_results
from python_corpus import VOCABULARY, Ids, read_corpus
from quality_runs import SCHEDULE_STEPS, Laboratory, Outcome, Phase, Scale
from recall import Result, Task, train
from resonate_table import SHARE, SPEED, name_of, summarise
from resonate_variants import CORE, LARGE, SMALL, VARIANTS, Shape, Variant

from pylon_api.training import Compile, ScheduleSpec

BASELINE = "transformer"
BUDGETS = ("tokens", "seconds", SHARE, SPEED)
SPEED_STEPS = 96
SCHEDULE = ScheduleSpec(steps=SCHEDULE_STEPS, warmup_steps=SCHEDULE_STEPS // 10)
RATE_SEED = 1000
RATE_SHARE = 0.25
RECALL_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
T = TypeVar("T")
REAL = Scale({}, sequences=64, tokens=512)
TOY = Scale({}, sequences=8, tokens=128)
TASKS = {
    "large": Task(Shape({"hidden_size": 128, "heads": 4}, SMALL.layers), 2048, 256, (8, 32, 64), 128, 6000),
    "small": Task(SMALL, 32, 32, (2, 4, 8), 32, 1500),
}


@dataclass(frozen=True)
class Contender:
    """A variant, compiled, and the learning rate that suits it."""

    variant: Variant
    laboratory: Laboratory
    rate: float

    def train(self, seed: int, *, seconds: float = math.nan, steps: int | None = None) -> Outcome:
        """From fresh weights, for so many steps or else seconds."""
        phase = Phase("scratch", "python", seconds, self.rate, SCHEDULE)
        return self.laboratory.train(self.variant.strategy, phase, seed, self.laboratory.start(seed), steps)[0]


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
        corpus = {k: ids for k, ids in read_corpus(self._arguments.corpus).items() if k.startswith("python")}
        entered = [self._survives(variant.name, partial(self._enter, variant, corpus)) for variant in variants]
        for seed in range(self._arguments.seeds):
            for contender in filter(None, entered):
                for budget in self._arguments.budgets:
                    what = f"{contender.variant.name}, seed {seed}, {budget}"
                    self._survives(what, partial(self._run_text, contender, seed, budget))

    def _enter(self, variant: Variant, corpus: Mapping[str, Ids]) -> Contender:
        """Compile it, and find its learning rate."""
        arguments = self._arguments
        shape, scale = (SMALL, TOY) if arguments.small else (LARGE, REAL)
        build = partial(variant.build, shape, VOCABULARY)
        laboratory = Laboratory(scale, corpus, self._device, arguments.compile, build)
        step_s = laboratory.prepare(variant.strategy, "python")
        tokens_per_s = scale.sequences * scale.tokens / step_s
        print(f"{variant.name}: {tokens_per_s:,.0f} tokens/s", flush=True)
        if arguments.learning_rate:
            return Contender(variant, laboratory, arguments.learning_rate)
        steps = max(1, round(RATE_SHARE * arguments.steps))
        rate, losses = lowest(
            variant.rates, lambda rate: Contender(variant, laboratory, rate).train(RATE_SEED, steps=steps).loss
        )
        tried = ", ".join(f"{loss:.4f} at {rate:g}" for rate, loss in sorted(losses.items()))
        print(f"{variant.name}: learning rate {rate:g} after {steps} steps of each ({tried})", flush=True)
        return Contender(variant, laboratory, rate)

    def _run_text(self, contender: Contender, seed: int, budget: str) -> None:
        variant, steps = contender.variant, self._arguments.steps
        if budget == "seconds":
            seconds = self._seconds_of_baseline(seed)
            if seconds is None or variant.name == BASELINE:
                return
            outcome = contender.train(seed, seconds=seconds)
        elif budget == SHARE:
            if variant.architecture != "resonate":
                return
            outcome = contender.train(seed, steps=round(0.8 * steps))
        elif budget == SPEED:
            if seed:
                return
            outcome = contender.train(seed, steps=SPEED_STEPS)
        else:
            outcome = contender.train(seed, steps=steps)
        self._keep(
            variant,
            "text",
            budget,
            seed,
            parameters=sum(parameter.numel() for parameter in contender.laboratory.model.parameters()),
            tokens=outcome.tokens,
            seconds=outcome.seconds,
            loss=outcome.loss,
            learning_rate=contender.rate,
        )

    def _seconds_of_baseline(self, seed: int) -> float | None:
        same = (device_name(), "text", BASELINE, seed, str(self._arguments.compile))
        for row in self.rows:
            if (row["device"], row["task"], name_of(row), row["seed"], row["compile"]) == same:
                return float(row["seconds"])
        return None

    def compare_recall(self, variants: list[Variant]) -> None:
        """Right answers by number of pairs."""
        task = TASKS["small" if self._arguments.small else "large"]
        rates: dict[str, float] = {}
        for seed in range(self._arguments.seeds):
            for variant in variants:
                what = f"{variant.name}, recall, seed {seed}"
                self._survives(what, partial(self._run_recall, variant, task, seed, rates))

    def _run_recall(self, variant: Variant, task: Task, seed: int, rates: dict[str, float]) -> None:
        """rates: what earlier seeds have found best, by variant."""
        results: dict[float, Result] = {}

        def misses(rate: float) -> float:
            results[rate] = train(variant, task, rate, seed, self._device, self._arguments.compile)
            return -sum(results[rate].recall.values())

        tried = (rates[variant.name],) if variant.name in rates else RECALL_RATES
        rate, _ = lowest(tried, misses)
        rates[variant.name], result = rate, results[rate]
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

    def _survives(self, what: str, work: Callable[[], T]) -> T | None:
        """What the work gives; whatever one kind dies of must not cost the others' runs."""
        if time.monotonic() > self._end_s:
            self.failures.append(f"{what}: out of time")
            return None
        try:
            return work()
        except Exception:
            print(f"{what} failed:\n{traceback.format_exc()}", flush=True)
            self.failures.append(what)
            return None

    def _keep(self, variant: Variant, task: str, budget: str, seed: int, **figures: Any) -> None:
        """Write a row, in the place of an older one of its kind."""
        row = {
            "architecture": variant.architecture,
            "ablation": variant.ablation,
            "task": task,
            "budget": budget,
            "device": device_name(),
            "compile": str(self._arguments.compile),
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


def lowest(rates: Sequence[float], loss_of: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """Where the loss is lowest, going from the middle down, or else up, for as long as that helps; and what was tried.

    rates: ascending. A loss that is not a number is no help.
    """
    losses: dict[float, float] = {}

    def loss_at(place: int) -> float:
        loss = loss_of(rates[place])
        losses[rates[place]] = math.inf if math.isnan(loss) else loss
        return losses[rates[place]]

    best = len(rates) // 2
    low = loss_at(best)
    for way in (-1, 1):
        place = best
        while 0 <= place + way < len(rates) and (loss := loss_at(place + way)) <= low:
            place, low = place + way, loss
        if place != best:
            return rates[place], losses
    return rates[best], losses


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the quality of architectures of equal size.")
    parser.add_argument("--only", choices=list(VARIANTS), action="append", help="default: the core table")
    parser.add_argument("--task", choices=["text", "recall"], action="append", help="default: both")
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300, help="of a run of equal tokens (default 300)")
    parser.add_argument(
        "--learning-rate", type=float, help="of text, for all; default: the best of each variant's list"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after them")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--compile",
        choices=list(Compile),
        type=Compile,
        help="default: Graph on CUDA, as these models' kernels are shorter than their launches; else Disabled",
    )
    parser.add_argument("--small", action="store_true", help="toy models, for CPUs")
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="file with the corpus")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory for the JSON file")
    arguments = parser.parse_args()
    tasks = arguments.task or ["text", "recall"]
    if "text" in tasks and not arguments.corpus.exists():
        parser.error(f"--corpus: {arguments.corpus} is not there; write it with gate_quality.py --prepare")
    arguments.compile = arguments.compile or (Compile.GRAPH if arguments.device == "cuda" else Compile.OFF)
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
