"""Activations of Resonate's gated MLP: speed of the gated product and of the MLP, and loss of a small model.

    python benchmarks/activations.py --part speed                     # a GPU, about a minute
    python benchmarks/activations.py --part loss [--minutes 2.4]      # a corpus (gate_quality.py --prepare)

`speed` times forward and backward together. A gated product moves eight elements at the least for each of its own:
forward reads two and writes one, backward reads three and writes two. bytes_per_s is those bytes over the time,
copy_fraction its share of what a copy reaches. `Binlop, fused` are the kernels, all others compiled PyTorch. The MLP is
compiled whole; `held` counts the tensors of inner width that it holds for the way back, in units of one of bfloat16.

`loss` trains the same model with each activation, seed by seed from the same weights and on the same data, on Python
sources. It keeps what earlier calls measured and goes on from there, as far as its minutes last.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gate_quality import CORPUS, COSINE, LEARNING_RATE
from measure import (
    RESULTS,
    captured,
    copy_bytes_per_s,
    device_name,
    milliseconds,
    print_table,
    publish,
    read_rows,
    write_results,
)
from python_corpus import read_corpus
from quality_runs import Laboratory, Phase, Scale, Strategy
from torch import Tensor

from pylon_api.training import Compile, ModelSpec
from pylon_trainer.kernels.binlop import bend
from pylon_trainer.models.context import Context
from pylon_trainer.models.resonate.binlop import Binlop
from pylon_trainer.models.resonate.model import activation_of
from pylon_trainer.models.transformer import GatedActivation, GatedMLP

ACTIVATIONS = ["Silu", "Gelu", "Relu", "Binlop"]
SHAPES = [
    (16384, 2048, 5632, torch.bfloat16),
    (65536, 512, 1408, torch.bfloat16),
    (16384, 2048, 5632, torch.float32),
]
"""Tokens, hidden width, inner width, type of the product; of the MLPs, those in bfloat16 are measured."""
PASSES = 8

LARGE = Scale({"layers": 7, "hidden_size": 512, "heads": 8}, sequences=32, tokens=512)
"""31M parameters, 16,384 tokens a step."""
SMALL = Scale({"layers": 2, "hidden_size": 64, "heads": 4}, sequences=4, tokens=128)
"""0.7M parameters, 512 tokens a step."""
PLAIN = Strategy("plain")


def spec_of(activation: str, **fields: Any) -> dict[str, Any]:
    return {"architecture": "Resonate", "resonate": {"activation": activation, "attention_every": 0}, **fields}


class PlainBinlop(Binlop):
    """The same as an expression, for the compiler."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return (bend(gate.float(), self.coefficients()) * up).to(gate.dtype)


def contestants() -> dict[str, GatedActivation]:
    known = {name: activation_of(ModelSpec.model_validate(spec_of(name))) for name in ACTIVATIONS}
    fused = known.pop("Binlop")
    assert isinstance(fused, Binlop)
    return known | {"Binlop, compiled": PlainBinlop(fused.minimum_slope).cuda(), "Binlop, fused": fused.cuda()}


def parameters_of(activation: GatedActivation) -> list[Tensor]:
    return list(activation.parameters()) if isinstance(activation, torch.nn.Module) else []


def product_ms(activation: GatedActivation, rows: int, width: int, dtype: torch.dtype) -> float:
    gate, up, d_y = (torch.randn(rows, width, device="cuda", dtype=dtype) for _ in range(3))
    leaves = [gate.requires_grad_(), up.requires_grad_(), *parameters_of(activation)]
    product = torch.compile(activation, fullgraph=True, dynamic=False)
    return milliseconds(captured(lambda: torch.autograd.grad(product(gate, up), leaves, d_y)))


def mlp_ms_and_held(activation: GatedActivation, rows: int, hidden: int, width: int) -> tuple[float, float]:
    """Milliseconds of forward and backward, and inner tensors held between them."""
    mlp = GatedMLP(hidden, width, activation).cuda()
    x, d_y = (torch.randn(1, rows, hidden, device="cuda") for _ in range(2))
    leaves = [x.requires_grad_(), *mlp.parameters()]
    nothing = torch.zeros(1, 1, device="cuda")
    context = Context.of(nothing, nothing, nothing)
    run: Callable[[Tensor, Context], Tensor] = torch.compile(mlp.forward, fullgraph=True, dynamic=False)

    def forward() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return run(x, context)

    held: dict[int, int] = {}

    def hold(tensor: Tensor) -> Tensor:
        if tensor.numel() >= rows * width:
            held[tensor.data_ptr()] = tensor.nbytes
        return tensor

    d_y = d_y.to(forward().dtype)
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        forward()
    time_ms = milliseconds(captured(lambda: torch.autograd.grad(forward(), leaves, d_y)))
    return time_ms, sum(held.values()) / (2 * rows * width)


def measure_speed(results: Path) -> None:
    copy = copy_bytes_per_s()
    rows_ = []
    for rows, hidden, width, dtype in SHAPES:
        for name, activation in contestants().items():
            torch._dynamo.reset()
            time_ms = product_ms(activation, rows, width, dtype)
            in_mlp = mlp_ms_and_held(activation, rows, hidden, width) if dtype == torch.bfloat16 else (None, None)
            bytes_per_s = PASSES * rows * width * dtype.itemsize / (time_ms / 1e3)
            rows_.append(
                {
                    "activation": name,
                    "rows": rows,
                    "width": width,
                    "dtype": str(dtype).removeprefix("torch."),
                    "milliseconds": time_ms,
                    "bytes_per_s": bytes_per_s,
                    "copy_fraction": bytes_per_s / copy,
                    "mlp_milliseconds": in_mlp[0],
                    "held": in_mlp[1],
                }
            )
            print(f"{name}, {rows} x {width}: {rows_[-1]['copy_fraction']:.2f} of a copy", flush=True)
    publish("activation_speed", rows_, results)


def measure_losses(arguments: argparse.Namespace) -> int:
    """Exit status: 1 when time ran out."""
    end_s, steps, results = time.monotonic() + 60 * arguments.minutes, arguments.steps, arguments.results
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scale = LARGE if device.type == "cuda" else SMALL
    phase = Phase("scratch", "python", 1.0, LEARNING_RATE, COSINE)
    rows = read_rows("activation_loss", results)
    done = {
        (row["activation"], row["seed"]) for row in rows if row["device"] == device_name() and row["steps"] == steps
    }
    corpus = read_corpus(arguments.corpus)
    laboratories: dict[str, Laboratory] = {}
    missing = [
        (name, seed)
        for seed in range(arguments.seeds)
        for name in arguments.activation or ACTIVATIONS
        if (name, seed) not in done
    ]
    for number, (name, seed) in enumerate(missing):
        if time.monotonic() > end_s:
            print(f"out of time: {len(missing) - number} runs are left for another call", file=sys.stderr)
            return 1
        if name not in laboratories:
            own = Scale(spec_of(name, **scale.model), scale.sequences, scale.tokens)
            compiles = Compile.DEFAULT if device.type == "cuda" else Compile.OFF
            laboratories[name] = Laboratory(own, corpus, device, compiles)
            laboratories[name].prepare(PLAIN, phase.kind)
        laboratory = laboratories[name]
        outcome, _ = laboratory.train(PLAIN, phase, seed, laboratory.start(seed), steps)
        rows.append(
            {
                "activation": name,
                "seed": seed,
                "device": device_name(),
                "parameters": sum(p.numel() for p in laboratory.model.parameters()),
                "steps": outcome.steps,
                "tokens": outcome.tokens,
                "loss": outcome.loss,
                "seconds": outcome.seconds,
            }
        )
        print(f"{name}, seed {seed}: {outcome.loss:.4f} after {outcome.seconds:.1f} s", flush=True)
        write_results("activation_loss", rows, results, timing="marks of the device around rounds of steps")
    print_table(rows)
    return 0


def main() -> int:
    on_device = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="Measure activations of the gated MLP.")
    parser.add_argument("--part", choices=["speed", "loss"], action="append", help="default: both")
    parser.add_argument("--activation", choices=ACTIVATIONS, action="append", help="of loss; default: all")
    parser.add_argument("--seeds", type=int, default=3, help="default 3")
    parser.add_argument("--steps", type=int, default=400 if on_device else 300, help="of a run")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which loss begins no further run")
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="file with the corpus")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory for the JSON files")
    arguments = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64  # activations share code, and each is another specialisation of it
    parts = arguments.part or ["speed", "loss"]
    if "speed" in parts:
        if not on_device:
            parser.error("no CUDA device here; --part speed measures device kernels, give --part loss")
        measure_speed(arguments.results)
    if "loss" in parts:
        if not arguments.corpus.exists():
            parser.error(f"--corpus: {arguments.corpus} is not there; write it with gate_quality.py --prepare")
        return measure_losses(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
