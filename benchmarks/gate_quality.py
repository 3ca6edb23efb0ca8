"""Quality at equal wall-clock time: plain training against gated, and against controls that cost no thought.

    python benchmarks/gate_quality.py --prepare                      # once, on any machine: minutes on a CPU
    python benchmarks/gate_quality.py [--phase late] [--seconds 6]   # trains; adds to the results of other phases
    python benchmarks/gate_quality.py --summary                      # prints the table of the results that are there

Phases: `scratch`, from random weights on Python sources; `late`, the decay at the end of a pretraining on them;
`finetune`, from that model to torch's sources. All strategies share learning rates, model, batch and, seed by seed,
starting weights and order of data; each run has the same time on the device (quality_runs.py says how it is taken).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, device_name, print_table, read_rows, write_results
from python_corpus import prepare, read_corpus
from quality_runs import SCHEDULE_STEPS, Laboratory, Outcome, Phase, Scale, Snapshot, Strategy
from quality_table import PLAIN, summarise

from pylon_api.training import Compile, ScheduleKind, ScheduleSpec

CORPUS = Path(__file__).parents[1] / ".cache" / "python_corpus.npz"
LARGE = Scale({"layers": 8, "hidden_size": 512, "heads": 8}, sequences=64, tokens=512)
"""30M parameters, 32,768 tokens a step."""
SMALL = Scale({"layers": 2, "hidden_size": 64, "heads": 4}, sequences=8, tokens=64)

LEARNING_RATE = 1e-3
PRETRAINING = Phase(
    "pretraining",
    "python",
    10.0,
    LEARNING_RATE,
    ScheduleSpec(kind=ScheduleKind.CONSTANT, steps=SCHEDULE_STEPS, warmup_steps=SCHEDULE_STEPS // 50),
)
DECAY = ScheduleSpec(kind=ScheduleKind.WARMUP_STABLE_DECAY, steps=SCHEDULE_STEPS, warmup_steps=0, decay_fraction=1.0)
WARM_UP_AND_DECAY = DECAY.model_copy(update={"warmup_steps": SCHEDULE_STEPS // 20})
COSINE = ScheduleSpec(steps=SCHEDULE_STEPS, warmup_steps=SCHEDULE_STEPS // 20)
PHASES = {
    "late": Phase("late", "python", 1.0, LEARNING_RATE, DECAY),
    "finetune": Phase("finetune", "torch", 0.5, LEARNING_RATE / 2, WARM_UP_AND_DECAY),
    "scratch": Phase("scratch", "python", 1.5, LEARNING_RATE, COSINE),
}
"""Seconds are multiples of --seconds."""


def gate(**fields: Any) -> dict[str, Any]:
    """A gate in the blocks that keeps to its ratio."""
    return {"strategy": "GradientNorm", "engine": "SinglePass", "ratio_control": "Fixed", "fallback": "Never"} | fields


SEQUENCES = {"granularity": "Sequence", "strategy": "Difficulty", "selection": "Top", "router_layers": 2}
STRATEGIES = {
    strategy.name: strategy
    for strategy in (
        Strategy("plain"),
        Strategy("gated", {"strategy": "GradientNorm", "engine": "SinglePass"}),
        Strategy("gated 0.5", gate(token_ratio=0.5)),
        Strategy("gated 0.25", gate(token_ratio=0.25)),
        Strategy("half batch", batch_share=0.5),
        Strategy("random rows 0.5", gate(strategy="Random", token_ratio=0.5)),
        Strategy("hardest tokens 0.25", gate(strategy="Difficulty", selection="Top", token_ratio=0.25)),
        Strategy("hardest sequences 0.25", gate(**SEQUENCES, engine="HeadOnly", token_ratio=0.25)),
        *(Strategy(name, time_factor=factor) for factor, name in PLAIN.items() if factor > 1),
        Strategy("gated dense", {"strategy": "GradientNorm", "engine": "SinglePass", "kv_gradient": "Dense"}),
        Strategy("gated 0.5 dense", gate(token_ratio=0.5, kv_gradient="Dense")),
        Strategy("gated 0.25 dense", gate(token_ratio=0.25, kv_gradient="Dense")),
        Strategy("exact 0.5, steps of gated 0.5", gate(token_ratio=0.5, engine="HeadOnly"), steps_of="gated 0.5"),
        Strategy("exact 0.25, steps of gated 0.25", gate(token_ratio=0.25, engine="HeadOnly"), steps_of="gated 0.25"),
    )
}
"""`gated` is the closed loop; `hardest` are the published selections, by entropy - confidence. What is `exact` shows
the price of truncated K/V gradients: the same selection and number of steps, and more time."""
NOT_FROM_SCRATCH = ("plain, 1.3x", "plain, 1.6x", "gated dense", "gated 0.5 dense", "gated 0.25 dense", "exact")


def strategies_of(phase: str, names: Sequence[str]) -> list[Strategy]:
    return [
        strategy
        for name, strategy in STRATEGIES.items()
        if name in names and not (phase == "scratch" and name.startswith(NOT_FROM_SCRATCH))
    ]


class Study:
    """All runs, in an order that leaves whole seeds behind when it must end early."""

    def __init__(self, laboratory: Laboratory, arguments: argparse.Namespace) -> None:
        self._laboratory = laboratory
        self._arguments = arguments
        self._end_s = time.monotonic() + 60 * arguments.minutes
        self.rows = read_rows("gate_quality", arguments.results)
        self.failures: list[str] = []
        self._ready: set[str] = set()

    def prepare(self) -> None:
        """Compile every strategy that some phase wants."""
        for name, strategy in STRATEGIES.items():
            if any(strategy in strategies_of(phase, self._arguments.strategy) for phase in self._arguments.phase):
                start = time.monotonic()
                try:
                    step_s = self._laboratory.prepare(strategy, "python")
                except Exception:  # whatever one strategy dies of must not cost the others' runs
                    self._fail(name)
                    continue
                self._ready.add(name)
                print(f"{name}: {step_s * 1e3:.2f} ms a step, warm after {time.monotonic() - start:.0f} s", flush=True)

    def pretrain(self, seconds: float) -> dict[str, Snapshot]:
        """Where the late phase and fine-tuning start: before and after the decay of one pretraining."""
        plain, lab = STRATEGIES["plain"], self._laboratory
        constant = scaled(PRETRAINING, seconds / PRETRAINING.seconds)
        outcome, before = lab.train(plain, constant, 1000, lab.start(1000))
        print(f"pretrained {outcome.steps} steps, {outcome.tokens:,} tokens: {outcome.loss:.4f}", flush=True)
        outcome, after = lab.train(plain, scaled(PHASES["late"], seconds / 5), 1001, before)
        print(f"then decayed {outcome.steps} steps: {outcome.loss:.4f}", flush=True)
        return {"late": before, "finetune": Snapshot(after.weights, None)}

    def compare(self, name: str, starts: Mapping[str, Snapshot]) -> None:
        """All strategies of a phase, seed by seed."""
        phase = scaled(PHASES[name], self._arguments.seconds)
        self.rows = [row for row in self.rows if (row["phase"], row["device"]) != (name, device_name())]
        for seed in range(self._arguments.seeds):
            start = starts[name] if name in starts else self._laboratory.start(seed)
            outcomes: dict[str, Outcome] = {}
            for strategy in strategies_of(name, self._arguments.strategy):
                if time.monotonic() > self._end_s:
                    self.failures.append(f"{name}: out of time at seed {seed}, {strategy.name}")
                    return
                if strategy.name not in self._ready or strategy.steps_of not in {None, *outcomes}:
                    continue
                steps = outcomes[strategy.steps_of].steps if strategy.steps_of else None
                try:
                    outcome, _ = self._laboratory.train(strategy, phase, seed, start, steps)
                    if outcome.recompiles:
                        print(f"{name} seed {seed} {strategy.name}: again, as something had to be compiled", flush=True)
                        outcome, _ = self._laboratory.train(strategy, phase, seed, start, steps)
                except Exception:
                    self._fail(f"{name}: {strategy.name}")
                    self._ready.discard(strategy.name)
                    continue
                outcomes[strategy.name] = outcome
                self._keep(name, strategy, seed, outcome)

    def _keep(self, phase: str, strategy: Strategy, seed: int, outcome: Outcome) -> None:
        self.rows.append(
            {
                "phase": phase,
                "device": device_name(),
                "sequences": self._laboratory.scale.sequences,
                "strategy": strategy.name,
                "ratio": outcome.ratio,
                "seed": seed,
                "seconds": outcome.seconds,
                "loss": outcome.loss,
                "steps": outcome.steps,
                "tokens": outcome.tokens,
                "step_ms": outcome.seconds / max(outcome.steps, 1) * 1e3,
                "recompiles": outcome.recompiles,
            }
        )
        print(
            f"{phase} seed {seed} {strategy.name}: {outcome.loss:.4f} after {outcome.steps} steps in "
            f"{outcome.seconds:.2f} s, ratio {outcome.ratio:.3f}",
            flush=True,
        )
        rates = {name: PHASES[name].learning_rate for name in PHASES}
        tokens = self._laboratory.scale.tokens
        write_results(
            "gate_quality", self.rows, self._arguments.results, learning_rate=rates, tokens_of_a_sequence=tokens
        )

    def _fail(self, what: str) -> None:
        print(f"{what} failed:\n{traceback.format_exc()}", flush=True)
        self.failures.append(what)


def scaled(phase: Phase, factor: float) -> Phase:
    return replace(phase, seconds=phase.seconds * factor)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare plain and gated training at equal wall-clock time.")
    parser.add_argument("--prepare", action="store_true", help="write the corpus from this machine's sources and end")
    parser.add_argument("--summary", action="store_true", help="print the table of the results that are there and end")
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="file with the corpus")
    parser.add_argument("--phase", choices=list(PHASES), action="append", help="default: all")
    parser.add_argument("--strategy", choices=list(STRATEGIES), action="append", help="default: all; plain always")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of a late run; others in proportion")
    parser.add_argument("--sequences", type=int, help="of a step; default: 64, in the toy 8")
    parser.add_argument("--pretrain-seconds", type=float, default=60.0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after them")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", choices=list(Compile), type=Compile, help="default: Graph on CUDA, else Disabled")
    parser.add_argument("--small", action="store_true", help="a toy model, to try the script out")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory for the JSON file")
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare(arguments.corpus)
        return 0
    if arguments.summary:
        print_table(summarise(read_rows("gate_quality", arguments.results)))
        return 0
    arguments.phase = [name for name in PHASES if name in (arguments.phase or PHASES)]
    arguments.strategy = {"plain", *(arguments.strategy or STRATEGIES)}
    if not arguments.corpus.exists():
        parser.error(f"--corpus: {arguments.corpus} is not there; write it with --prepare")
    torch._dynamo.config.recompile_limit = 64  # the strategies share code, and each is another specialisation of it
    scale = SMALL if arguments.small else LARGE
    if arguments.sequences:
        scale = replace(scale, sequences=arguments.sequences)
    device = torch.device(arguments.device)
    compile = arguments.compile or (Compile.GRAPH if device.type == "cuda" else Compile.OFF)
    study = Study(Laboratory(scale, read_corpus(arguments.corpus), device, compile), arguments)
    study.prepare()
    starts = study.pretrain(arguments.pretrain_seconds) if set(arguments.phase) - {"scratch"} else {}
    for name in arguments.phase:
        study.compare(name, starts)
    print_table(summarise(study.rows))
    if study.failures:
        print(f"failed: {'; '.join(study.failures)}", file=sys.stderr)
    return 1 if study.failures else 0


if __name__ == "__main__":
    sys.exit(main())
