"""One training step, gated against plain: time, memory and counted FLOPs, for every engine and ratio.

    python benchmarks/gate_step.py [--compile] [--shape 14M]

A step is forward and backward; the optimizer's part is the same for all and left out. On CUDA the shapes are real ones
in bfloat16, on a CPU small ones in float32. The steps take turns, so that a machine whose speed drifts slows all alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, publish
from torch.utils.flop_counter import FlopCounterMode

from pylon_api.training import Compile, DataSpec, GatingSpec, ModelSpec, Precision, ScheduleSpec, TrainingSpec
from pylon_trainer.gating import build_step
from pylon_trainer.models import Transformer, build_model
from pylon_trainer.step import Batch, TrainingStep

SHAPES: dict[str, dict[str, tuple[dict[str, Any], int, int, int]]] = {
    "cpu": {
        "14M": ({"layers": 4, "hidden_size": 512, "heads": 8}, 2048, 4, 256),
    },
    "cuda": {
        "135M": (
            {"layers": 30, "hidden_size": 576, "heads": 9, "kv_heads": 3, "intermediate_size": 1536},
            49152,
            32,
            2048,
        ),
        "1.17B": (
            {"layers": 20, "hidden_size": 2048, "heads": 16, "intermediate_size": 5632},
            49152,
            8,
            2048,
        ),
    },
}
"""By device: model, vocabulary, sequences, tokens of a sequence."""

ENGINES = (
    ("HeadOnly", "Truncated", "Keep"),
    ("SinglePass", "Truncated", "Keep"),
    ("SinglePass", "Dense", "Keep"),
    ("SinglePass", "Truncated", "Recompute"),
)
RATIOS = (1.0, 0.5, 0.25, 0.125)
ROUNDS = 5


def step_of(model: Transformer, compiles: bool, **gating: Any) -> TrainingStep:
    device = model.embedding.weight.device
    training = TrainingSpec(
        data=DataSpec(train=["unused"]),
        schedule=ScheduleSpec(steps=1),
        precision=Precision.BFLOAT16 if device.type == "cuda" else Precision.FLOAT32,
        compile=Compile.DEFAULT if compiles else Compile.OFF,
        gating=GatingSpec.model_validate(gating),
    )
    return build_step(model, training, device)


def batch_of(vocabulary: int, sequences: int, tokens: int, device: str) -> Batch:
    tokens_BT = torch.randint(vocabulary, (sequences, tokens + 1), generator=torch.Generator().manual_seed(1))
    return Batch(tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous()).to(torch.device(device))


def run(step: TrainingStep, batch: Batch) -> None:
    step.model.zero_grad()
    step.forward_backward(batch, global_tokens=batch.labels_BT.numel(), step=0)
    if batch.labels_BT.is_cuda:
        torch.cuda.synchronize()


def seconds(step: TrainingStep, batch: Batch) -> float:
    start = time.perf_counter()
    run(step, batch)
    return time.perf_counter() - start


def peak_bytes(step: TrainingStep, batch: Batch) -> int | None:
    """Device memory at its highest; None on a CPU, where the allocator does not tell."""
    if not batch.labels_BT.is_cuda:
        return None
    torch.cuda.reset_peak_memory_stats()
    run(step, batch)
    return torch.cuda.max_memory_allocated()


def backward_flops(step: TrainingStep, batch: Batch) -> int:
    """All products of an eager step but those of one forward pass through blocks and head."""
    with FlopCounterMode(display=False) as whole:
        run(step, batch)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        step.model.head(step.model(batch.tokens_BT))
    return int(whole.get_total_flops() - forward.get_total_flops())


def measure(shape: str, device: str, compiles: bool) -> list[dict[str, Any]]:
    fields, vocabulary, sequences, tokens = SHAPES[device][shape]
    torch.manual_seed(0)
    model = build_model(ModelSpec.model_validate(fields), vocab_size=vocabulary).to(device)
    batch = batch_of(vocabulary, sequences, tokens, device)
    kinds = [(engine, ratio) for engine in ENGINES for ratio in RATIOS]
    gatings: list[dict[str, Any]] = [{}]  # plain
    for (engine, kv_gradient, activations), ratio in kinds:
        gatings.append(
            {
                "strategy": "GradientNorm",
                "ratio_control": "Fixed",
                "token_ratio": ratio,
                "engine": engine,
                "kv_gradient": kv_gradient,
                "row_activations": activations,
            }
        )
    flops = [backward_flops(step_of(model, False, **gating), batch) for gating in gatings]
    steps = [step_of(model, compiles, **gating) for gating in gatings]
    for step in steps:
        run(step, batch)
    times = [[seconds(step, batch) for step in steps] for _ in range(ROUNDS)]
    step_s = [statistics.median(column) for column in zip(*times, strict=True)]
    peaks = [peak_bytes(step, batch) for step in steps]
    return [
        {
            "shape": shape,
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "compiled": compiles,
            "engine": " ".join(engine),
            "granularity": "token",
            "ratio": ratio,
            "step_ms": own_s * 1e3,
            "plain_ms": step_s[0] * 1e3,
            "speedup": step_s[0] / own_s,
            "memory_ratio": own_bytes / peaks[0] if own_bytes and peaks[0] else None,
            "backward_flop_ratio": own_flops / flops[0],
        }
        for (engine, ratio), own_s, own_bytes, own_flops in zip(kinds, step_s[1:], peaks[1:], flops[1:], strict=True)
    ]


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description="Measure gated steps beside plain ones.")
    parser.add_argument("--shape", choices=list(SHAPES[device]), action="append", help="default: all of this device")
    parser.add_argument("--compile", action="store_true", help="compile all steps, the plain one too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory for the JSON file")
    arguments = parser.parse_args()
    shapes = arguments.shape or list(SHAPES[device])
    rows = [row for shape in shapes for row in measure(shape, device, arguments.compile)]
    publish("gate_step", rows, arguments.results, timing=f"median of {ROUNDS} steps, all kinds taking turns")


if __name__ == "__main__":
    main()
