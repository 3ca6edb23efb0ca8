"""Tokens per second of whole training steps as sequences grow: Transformer, Mamba-2 alone, Resonate; equal parameters.

    python benchmarks/resonate_throughput.py [--quick] [--architecture resonate] [--tokens 8192] [--recompute Blocks]

A step is forward, backward, clipping and AdamW over the same number of tokens, whatever the length of a sequence.
`resonate` never attends; `resonate + attention` does so in one block of eight, as it is by default. Blocks are
compiled, attention is the fastest that torch has, weights are float32 and products bfloat16 on CUDA; on CPUs models are
small and float32. `recompute` is `training.recompute`, the same for all: with Mixers every architecture holds what
autograd holds, but for what lies between the two projections of a mixer and the scores of attention; with Blocks nobody
holds more than the input of each block. Activations are the peak of a step over what is there between steps. Ratios are
to the rows of the same length and recompute; `activations_to_transformer_mixers` is to the Transformer that recomputes
nothing else. A kind that fails is named, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gate_step import step_of
from measure import RESULTS, Mark, device_name, print_table, read_rows, write_results
from torch import Tensor

from pylon_api.training import Compile, ModelSpec, OptimizerSpec, Recompute
from pylon_trainer.models import Decoder, Resonate, build_model
from pylon_trainer.models.context import Context
from pylon_trainer.models.resonate.mamba import Mamba
from pylon_trainer.models.resonate.model import MixerBlock
from pylon_trainer.optim.optimizer import Optimizer
from pylon_trainer.step import Batch

GIB = 2**30
WARM_STEPS = 3
QUICK_TOKENS = 8192
"""Of a sequence."""


class Mamba2(Resonate):
    """Mamba-2 as published: blocks of a mixer and no MLP."""

    def _block(self, number: int) -> MixerBlock:  # noqa: ARG002
        return MixerOnly(self.spec, Mamba(self.spec))


class MixerOnly(MixerBlock):
    def __init__(self, spec: ModelSpec, mixer: Mamba) -> None:
        super().__init__(spec, mixer)
        del self.mlp_norm, self.mlp

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        updated_BTD: Tensor = x_BTD + self.mixer(self.mixer_norm(x_BTD), context)
        return updated_BTD

    def residual_outputs(self) -> tuple[torch.nn.Linear, ...]:
        return (self.mixer.output,)


@dataclass(frozen=True)
class Size:
    """Layers that give each architecture about as many parameters as the others."""

    model: dict[str, Any]
    layers: dict[str, int]
    vocabulary: int
    tokens_of_step: int
    tokens: tuple[int, ...]
    """Of a sequence."""


SIZES = {
    "cpu": Size(
        {"hidden_size": 128, "heads": 4},
        {"transformer": 4, "mamba2": 8, "resonate": 3, "resonate + attention": 3},
        2048,
        2048,
        (256, 1024),
    ),
    "cuda": Size(
        {"hidden_size": 768, "heads": 12, "intermediate_size": 2048},
        {"transformer": 12, "mamba2": 23, "resonate": 10, "resonate + attention": 10},
        8192,
        65536,
        (1024, 2048, 8192, 32768),
    ),
}


def build(architecture: str, size: Size, device: torch.device, kernel: str) -> Decoder:
    fields = size.model | {"layers": size.layers[architecture]}
    if architecture != "transformer":
        own = {"scan_kernel": kernel, "attention_every": 8 if "attention" in architecture else 0}
        fields |= {"architecture": "Resonate", "resonate": own}
    spec = ModelSpec.model_validate(fields)
    torch.manual_seed(0)
    if architecture == "mamba2":
        return Mamba2(spec, size.vocabulary).to(device)
    return build_model(spec, vocab_size=size.vocabulary).to(device)


def measure(
    architecture: str, size: Size, tokens: int, steps: int, device: torch.device, kernel: str, recompute: Recompute
) -> dict[str, Any]:
    model = build(architecture, size, device, kernel)
    training_step = step_of(model, device, Compile.DEFAULT if device.type == "cuda" else Compile.OFF, {})
    model.recomputes_blocks = recompute is Recompute.BLOCKS
    parameters = dict(model.named_parameters())
    optimizer = Optimizer(parameters, OptimizerSpec())
    tokens_BT = torch.randint(size.vocabulary, (max(1, size.tokens_of_step // tokens), tokens + 1))
    batch = Batch(tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous()).to(device)
    marks = [Mark(device)]
    held_bytes = 0
    for number in range(WARM_STEPS + steps):
        if number == WARM_STEPS and device.type == "cuda":
            torch.cuda.synchronize()
            held_bytes = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        training_step.forward_backward(batch, global_tokens=batch.labels_BT.numel(), step=number)
        optimizer.update(1e-4)
        for parameter in parameters.values():
            parameter.grad = None
        marks.append(Mark(device))
    marks[-1].wait()
    times_ms = [marks[n].milliseconds_to(marks[n + 1]) for n in range(WARM_STEPS, WARM_STEPS + steps)]
    step_ms = statistics.median(times_ms)
    count = sum(parameter.numel() for parameter in parameters.values())
    # Gradients are there at the peak, not between steps, and are no activations.
    peak_bytes = torch.cuda.max_memory_allocated() - held_bytes - 4 * count if device.type == "cuda" else None
    return {
        "architecture": architecture,
        "device": device_name(),
        "kernel": "torch" if architecture == "transformer" else kernel,
        "recompute": str(recompute),
        "parameters": count,
        "sequence": tokens,
        "tokens_per_s": batch.tokens_BT.numel() / step_ms * 1e3,
        "step_ms": step_ms,
        "activation_gib": None if peak_bytes is None else peak_bytes / GIB,
    }


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row beside the Transformer's and Mamba-2's of the same length and recompute."""

    def best(architecture: str, sequence: int, recompute: str) -> dict[str, Any]:
        same = [
            row
            for row in rows
            if (row["architecture"], row["sequence"], row["recompute"]) == (architecture, sequence, recompute)
        ]
        return max(same, key=lambda row: row["tokens_per_s"], default={})

    def ratio(row: dict[str, Any], rival: dict[str, Any], key: str) -> float | None:
        return row[key] / rival[key] if rival.get(key) else None

    for row in rows:
        same = row["sequence"], row["recompute"]
        row["speedup"] = ratio(row, best("transformer", *same), "tokens_per_s")
        row["speed_to_mamba2"] = ratio(row, best("mamba2", *same), "tokens_per_s")
        row["activations_to_transformer"] = ratio(row, best("transformer", *same), "activation_gib")
        plain = best("transformer", row["sequence"], str(Recompute.MIXERS))
        row["activations_to_transformer_mixers"] = ratio(row, plain, "activation_gib")
    return rows


def kinds(arguments: argparse.Namespace, size: Size) -> Iterator[tuple[str, int, str, Recompute]]:
    """Architecture, tokens of a sequence, kernel of the scan and recompute."""
    usual = [QUICK_TOKENS] if arguments.quick else size.tokens
    for tokens in arguments.tokens or usual:
        # Work that is done twice costs the same share at every length: one is enough.
        recomputes = [Recompute.MIXERS, *([Recompute.BLOCKS] if tokens == QUICK_TOKENS else [])]
        for architecture in arguments.architecture or [
            name for name in size.layers if not (arguments.quick and "attention" in name)
        ]:
            for recompute in map(Recompute, arguments.recompute or recomputes):
                for kernel in ["PyTorch"] if architecture == "transformer" else arguments.kernel or ["Auto"]:
                    yield architecture, tokens, kernel, recompute


def main() -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = SIZES[device.type]
    parser = argparse.ArgumentParser(description="Measure training throughput over the length of sequences.")
    parser.add_argument("--architecture", choices=list(size.layers), action="append", help="default: all")
    parser.add_argument("--tokens", type=int, action="append", help="of a sequence; default: several")
    parser.add_argument("--kernel", choices=["PyTorch", "Auto"], action="append", help="of the scan; default: Auto")
    parser.add_argument("--recompute", choices=list(Recompute), action="append", help="default: Mixers; at 8192 both")
    parser.add_argument("--quick", action="store_true", help="sequences of 8192 tokens alone")
    parser.add_argument("--steps", type=int, default=5, help="that count (default 5)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory for the JSON file")
    arguments = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64
    kept = [row for row in read_rows("resonate_throughput", arguments.results) if row["device"] != device_name()]
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    for architecture, tokens, kernel, recompute in kinds(arguments, size):
        name = f"{architecture}, {kernel}, {tokens} tokens, recompute {recompute}"
        try:
            rows.append(measure(architecture, size, tokens, arguments.steps, device, kernel, recompute))
            print(f"{name}: {rows[-1]['tokens_per_s']:,.0f} tokens/s", flush=True)
        except Exception:  # whatever one kind dies of must not cost the others' time
            failures.append(name)
            print(f"{name} failed:\n{traceback.format_exc()}", flush=True)
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if rows:
        print_table(with_ratios(rows))
        write_results("resonate_throughput", kept + rows, arguments.results, timing="median of steps")
    if failures:
        print(f"failed: {'; '.join(failures)}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
