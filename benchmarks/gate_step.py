"""One optimizer step, gated against plain: time, memory and counted FLOPs, for every engine and ratio.

    python benchmarks/gate_step.py [--shape 1.17B] [--quick] [--compile Graph]

A step is forward, backward, clipping and AdamW, its learning rate 0, so that all kinds meet the same weights. They
take turns, so that a machine whose speed drifts slows all alike (recorded ones, which hold on to their memory, come one
after the other), and are compared with the fastest of several plain
steps (plain_baselines.py). On CUDA the shapes are real ones in bfloat16, on a CPU a small one in float32. FLOPs are
counted on tensors without data. A kind that fails costs only itself: it is named, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, device_name, print_table, read_rows, write_results
from plain_baselines import WholeHeadStep, fastest_attention, rival_heads
from step_bench import ROUNDS, Bench, Kind
from step_flops import StepFlops, counting_process, step_flops

from pylon_api.training import Compile, DataSpec, GatingSpec, ModelSpec, Precision, ScheduleSpec, TrainingSpec
from pylon_trainer.gating import build_step
from pylon_trainer.models import Decoder, build_model
from pylon_trainer.step import Batch, TrainingStep


@dataclass(frozen=True)
class Shape:
    model: dict[str, Any]
    vocabulary: int
    sequences: int
    tokens: int
    """Of a sequence."""

    def batch(self, sequences: int, device: torch.device) -> Batch:
        tokens_BT = torch.randint(self.vocabulary, (sequences, self.tokens + 1))
        return Batch(tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous()).to(device)

    def build(self, layers: int | None = None) -> Decoder:
        fields = self.model if layers is None else {**self.model, "layers": layers}
        return build_model(ModelSpec.model_validate(fields), vocab_size=self.vocabulary)


SCANS = {"architecture": "Resonate", "resonate": {"attention_every": 0}}
SHAPES = {
    "cpu": {
        "14M": Shape({"layers": 4, "hidden_size": 512, "heads": 8}, 2048, sequences=4, tokens=256),
        "12M Resonate": Shape(SCANS | {"layers": 3, "hidden_size": 512, "heads": 8}, 2048, sequences=4, tokens=256),
    },
    "cuda": {
        "1.17B": Shape(
            {"layers": 20, "hidden_size": 2048, "heads": 16, "intermediate_size": 5632}, 49152, sequences=8, tokens=2048
        ),
        "135M": Shape(
            {"layers": 30, "hidden_size": 576, "heads": 9, "kv_heads": 3, "intermediate_size": 1536},
            49152,
            sequences=32,
            tokens=2048,
        ),
        "122M Resonate": Shape(
            SCANS | {"layers": 10, "hidden_size": 768, "heads": 12, "intermediate_size": 2048},
            49152,
            sequences=8,
            tokens=8192,
        ),
    },
}

SEQUENCES = {"granularity": "Sequence", "strategy": "Difficulty", "selection": "Top", "router_layers": 4}
ENGINES: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "SinglePass Truncated Keep": ({"engine": "SinglePass"}, (0.25, 0.5, 0.125, 1.0)),
    "TwoPass": ({"engine": "TwoPass"}, (0.25, 0.5, 0.125)),
    "SinglePass Dense Keep": ({"engine": "SinglePass", "kv_gradient": "Dense"}, (0.25, 0.5)),
    "SinglePass Truncated Recompute": ({"engine": "SinglePass", "row_activations": "Recompute"}, (0.25,)),
    "HeadOnly": ({"engine": "HeadOnly"}, (0.25,)),
    "Sequence, 4-layer router": (SEQUENCES, (0.25,)),
}
"""Fields of the gate and ratios to measure."""
QUICK = ("SinglePass Truncated Keep", "TwoPass")
QUICK_RATIOS = (0.25, 0.5, 1.0)


def step_of(model: Decoder, device: torch.device, compile: Compile, gating: dict[str, Any]) -> TrainingStep:
    training = TrainingSpec(
        data=DataSpec(train=["unused"]),
        schedule=ScheduleSpec(steps=1),
        precision=Precision.BFLOAT16 if device.type == "cuda" else Precision.FLOAT32,
        compile=compile,
        gating=GatingSpec.model_validate(gating),
    )
    return build_step(model, training, device)


def gate_of(fields: dict[str, Any], ratio: float) -> dict[str, Any]:
    """A gate of fixed ratio that never falls back to the plain step."""
    return {"strategy": "GradientNorm", "ratio_control": "Fixed", "fallback": "Never", "token_ratio": ratio} | fields


def measure(
    shape: Shape, device: torch.device, compile: Compile, quick: bool, counting: Executor, failures: list[str]
) -> list[Kind]:
    """All kinds that came through; the others are named in `failures`."""

    def survives(kind: Kind, trial: Callable[[Kind], None]) -> bool:
        try:
            trial(kind)
        except Exception:  # whatever one kind dies of must not cost the device time of the others
            failures.append(f"{kind.name} {kind.ratio}")
            print(f"  {failures[-1]} failed:\n{traceback.format_exc()}", flush=True)
            bench.model.zero_grad()
            return False
        return True

    torch.manual_seed(0)
    bench = Bench(shape.build().to(device), shape.batch(shape.sequences, device))

    def count(gating: dict[str, Any]) -> Future[StepFlops]:
        return counting.submit(step_flops, shape.model, shape.vocabulary, shape.tokens, gating)

    kinds = [
        *plain_kinds(bench.model, device, compile, count({})),
        *(
            Kind(
                name,
                ratio,
                partial(step_of, bench.model, device, compile, gate_of(fields, ratio)),
                count(gate_of(fields, ratio)),
                granularity=fields.get("granularity", "Token").lower(),
            )
            for name, fields, ratio in gates(quick)
        ),
    ]
    if compile is Compile.GRAPH:
        return [kind for kind in kinds if survives(kind, bench.measure_alone)]
    kinds = [kind for kind in kinds if survives(kind, bench.warm_up)]
    for _ in range(ROUNDS):
        kinds = [kind for kind in kinds if survives(kind, bench.take_turn)]
    for kind in kinds[1:]:
        if kinds[0].is_plain and kind.ratio == 1 and not kind.is_plain:
            kind.gradient_difference = bench.gradient_difference(kind, kinds[0])
    return kinds


def plain_kinds(model: Decoder, device: torch.device, compile: Compile, flops: Future[StepFlops]) -> Iterator[Kind]:
    """Pylon's own, and on CUDA the same blocks with other heads."""
    yield Kind("Plain", 1.0, partial(step_of, model, device, compile, {}), flops, is_plain=True)
    if device.type == "cuda":
        for name, loss_sum in rival_heads().items():
            yield Kind(f"Plain, {name}", 1.0, partial(WholeHeadStep, model, loss_sum), flops, is_plain=True)


def gates(quick: bool) -> Iterator[tuple[str, dict[str, Any], float]]:
    for name, (fields, ratios) in ENGINES.items():
        for ratio in ratios:
            if not quick or (name in QUICK and ratio in QUICK_RATIOS):
                yield name, fields, ratio


def rows_of(
    name: str,
    shape: Shape,
    device: torch.device,
    arguments: argparse.Namespace,
    counting: Executor,
    failures: list[str],
) -> list[dict[str, Any]]:
    """One flat object of every kind, beside the fastest plain one; none when every plain one failed."""
    print(f"{name}:", flush=True)
    spec = ModelSpec.model_validate(shape.model)
    with fastest_attention(spec, shape.sequences, shape.tokens) if device.type == "cuda" else nullcontext():
        kinds = measure(shape, device, arguments.compile, arguments.quick, counting, failures)
    plains = [kind for kind in kinds if kind.is_plain]
    if not plains:
        return []
    plain = min(plains, key=lambda kind: statistics.median(kind.step_ms))
    print(f"  the fastest plain step: {plain.name}", flush=True)
    plain_flops = flops_of(plain)
    return [
        {
            "shape": name,
            "device": device_name(),
            "torch": torch.__version__,
            "compiled": str(arguments.compile),
            "engine": kind.name,
            "granularity": kind.granularity,
            "ratio": kind.ratio,
            "step_ms": statistics.median(kind.step_ms),
            "plain_ms": statistics.median(plain.step_ms),
            "speedup": statistics.median(plain.step_ms) / statistics.median(kind.step_ms),
            "memory_ratio": ratio_of(kind.peak_bytes, plain.peak_bytes),
            "activation_memory_ratio": ratio_of(activation_bytes(kind), activation_bytes(plain)),
            "backward_flop_ratio": flops.backward / plain_flops.backward if flops and plain_flops else None,
            "step_flop_ratio": flops.whole / plain_flops.whole if flops and plain_flops else None,
            "forward_backward_ms": statistics.median(kind.forward_backward_ms),
            "forward_backward_speedup": statistics.median(plain.forward_backward_ms)
            / statistics.median(kind.forward_backward_ms),
            "includes_optimizer": True,
            "plain_head": plain.name,
            "kinds": "one after the other" if arguments.compile is Compile.GRAPH else "taking turns",
            "syncs": kind.syncs,
            "recompiles": kind.recompiles,
            "gradient_difference": kind.gradient_difference,
        }
        for kind, flops in zip(kinds, map(flops_of, kinds), strict=True)
    ]


def activation_bytes(kind: Kind) -> int | None:
    if kind.peak_bytes is None or kind.persistent_bytes is None:
        return None
    return kind.peak_bytes - kind.persistent_bytes


def flops_of(kind: Kind) -> StepFlops | None:
    """None when they could not be counted."""
    error = kind.flops.exception()
    if error is not None:
        print(f"  FLOPs of {kind.name} {kind.ratio}: {error!r}")
    return None if error is not None else kind.flops.result()


def ratio_of(part: int | None, whole: int | None) -> float | None:
    return part / whole if part is not None and whole else None


def main() -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = SHAPES[device.type]
    parser = argparse.ArgumentParser(description="Measure gated steps beside plain ones.")
    parser.add_argument("--shape", choices=list(shapes), action="append", help="default: all of this device")
    parser.add_argument("--quick", action="store_true", help="fewer engines and ratios")
    default = Compile.DEFAULT if device.type == "cuda" else Compile.OFF
    parser.add_argument("--compile", choices=list(Compile), type=Compile, default=default, help=f"default: {default}")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory for the JSON file")
    arguments = parser.parse_args()
    # The kinds share code, and each is another specialisation of it.
    torch._dynamo.config.recompile_limit = 64
    kept = read_rows("gate_step", arguments.results)  # of other shapes and devices, or compiled in another way
    failures: list[str] = []
    with counting_process() as counting:
        for name in arguments.shape or list(shapes):
            rows = rows_of(name, shapes[name], device, arguments, counting, failures)
            if rows:
                print_table(rows)
                same = (name, device_name(), str(arguments.compile))
                kept = [row for row in kept if (row["shape"], row["device"], row["compiled"]) != same] + rows
                write_results("gate_step", kept, arguments.results, timing="median of steps")
            torch._dynamo.reset()
            gc.collect()  # the next shape's memory must not include this one's
    if failures:
        print(f"failed: {', '.join(failures)}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
