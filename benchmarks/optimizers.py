"""Optimizers: milliseconds and bytes of an update beside torch's own, and held-out loss after equal steps.

    python benchmarks/optimizers.py updates     # under a minute on a GPU
    python benchmarks/optimizers.py losses      # needs the corpus of gate_quality.py --prepare

An update is clipping and the optimizer's step on weights and gradients that stay. `host_ms` is the time until the host
has launched it. For losses each optimizer trains the same model from the same weights on the same batches, at each of a
few learning rates.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gate_quality import CORPUS, COSINE, LARGE, SMALL
from measure import RESULTS, Mark, device_name, host_syncs, print_table, read_rows, write_results
from python_corpus import read_corpus
from quality_runs import Laboratory, Phase, Scale, Strategy
from torch.nn import Parameter

from pylon_api.training import Compile, ModelSpec, OptimizerName, OptimizerSpec
from pylon_trainer.models import build_model
from pylon_trainer.optim.muon import is_hidden_matrix
from pylon_trainer.optim.optimizer import Optimizer

CLIP_NORM = 1.0
SHAPES: dict[str, dict[str, tuple[dict[str, Any], int]]] = {
    "cpu": {"0.4M": ({"layers": 2, "hidden_size": 128, "heads": 4}, 512)},
    "cuda": {
        "135M": ({"layers": 30, "hidden_size": 576, "heads": 9, "kv_heads": 3, "intermediate_size": 1536}, 49152),
        "1.17B": ({"layers": 20, "hidden_size": 2048, "heads": 16, "intermediate_size": 5632}, 32000),
    },
}
"""Model and vocabulary."""

RATES: dict[str, tuple[float, ...]] = {
    "AdamW": (1e-3, 3e-3),
    "Muon": (1e-3, 3e-3),
    "Lion": (3e-4, 1e-3),
    "Adafactor": (2e-2, 6e-2),
    "Sophia": (1e-3, 3e-3),
}
"""Peak learning rates that losses are measured at."""


@dataclass(frozen=True)
class Contender:
    name: str
    update: Callable[[], object]
    state_bytes: Callable[[], int]
    """After the first update."""


def ours(spec: OptimizerSpec, parameters: dict[str, Parameter]) -> Contender:
    optimizer = Optimizer(parameters, spec)
    name = spec.name + (" + Lookahead" if spec.lookahead else "")
    return Contender(name, lambda: optimizer.update(1e-5), lambda: sum(t.nbytes for t in optimizer.tensors.values()))


def torchs(name: str, parameters: dict[str, Parameter], *optimizers: torch.optim.Optimizer) -> Contender:
    """Clipping and these, each with its own share of the parameters."""

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP_NORM)
        for optimizer in optimizers:
            optimizer.step()

    def state_bytes() -> int:
        states = [state for optimizer in optimizers for state in optimizer.state.values()]
        return sum(value.nbytes for state in states for value in state.values() if isinstance(value, torch.Tensor))

    return Contender(f"torch's {name}", update, state_bytes)


def torchs_muon(parameters: dict[str, Parameter], is_fused: bool) -> Contender:
    hidden = [p for name, p in parameters.items() if is_hidden_matrix(name, p.shape)]
    others = [p for name, p in parameters.items() if not is_hidden_matrix(name, p.shape)]
    muon = torch.optim.Muon(hidden, lr=1e-5, adjust_lr_fn="match_rms_adamw")
    return torchs("Muon + AdamW", parameters, muon, torch.optim.AdamW(others, lr=1e-5, fused=is_fused))


def contenders(parameters: dict[str, Parameter], device: torch.device) -> list[Callable[[], Contender]]:
    """To be built one after the other, as each needs memory."""
    specs = [OptimizerSpec(name=name) for name in OptimizerName]
    specs.append(OptimizerSpec.model_validate({"lookahead": {}}))
    values, is_fused = list(parameters.values()), device.type == "cuda"
    return [
        lambda: torchs("fused AdamW", parameters, torch.optim.AdamW(values, lr=1e-5, fused=True)),
        *(lambda spec=spec: ours(spec, parameters) for spec in specs),  # type: ignore[misc]
        lambda: torchs_muon(parameters, is_fused),
        lambda: torchs("Adafactor", parameters, torch.optim.Adafactor(values, lr=1e-5, foreach=is_fused)),
    ]


def measure_updates(shape: str, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """A row for each optimizer on a model of this shape."""
    fields, vocabulary = SHAPES[device.type][shape]
    torch.manual_seed(0)
    with device:
        model = build_model(ModelSpec.model_validate(fields), vocab_size=vocabulary)
        parameters = dict(model.named_parameters())
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter)
    values = sum(parameter.numel() for parameter in parameters.values())
    rows = []
    for build in contenders(parameters, device):
        contender = build()
        for _ in range(3):
            contender.update()
        row = {"shape": shape, "parameters": values, "optimizer": contender.name, **_times(contender, device, repeats)}
        row["state_bytes_per_parameter"] = contender.state_bytes() / values
        rows.append({**row, "device": device_name()})
        print(f"{shape} {contender.name}: {row['update_ms']:.2f} ms", flush=True)
        del contender
        gc.collect()
    return rows


def _times(contender: Contender, device: torch.device, repeats: int) -> dict[str, Any]:
    on_cuda = device.type == "cuda"
    update_ms, host_ms = [], []
    for _ in range(repeats):
        begin, start_s = Mark(device), time.perf_counter()
        contender.update()
        host_ms.append((time.perf_counter() - start_s) * 1e3)
        end = Mark(device)
        end.wait()
        update_ms.append(begin.milliseconds_to(end))
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contender.update()
        torch.cuda.synchronize()
    return {
        "update_ms": statistics.median(update_ms),
        "host_ms": statistics.median(host_ms),
        "host_syncs": host_syncs(contender.update) if on_cuda else None,
        "peak_gib": (torch.cuda.max_memory_allocated() - before) / 2**30 if on_cuda else None,
    }


def measure_losses(arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """A row for each architecture, optimizer and learning rate."""
    scale = SMALL if arguments.small else LARGE
    corpus = read_corpus(arguments.corpus)
    compile = Compile.DEFAULT if device.type == "cuda" else Compile.OFF
    rows = []
    for architecture in arguments.architecture:
        fields = scale.model | {"architecture": architecture}
        laboratory = Laboratory(Scale(fields, scale.sequences, scale.tokens), corpus, device, compile)
        parameters = sum(parameter.numel() for parameter in laboratory.model.parameters())
        for name in arguments.optimizer:
            spec = OptimizerSpec.model_validate({"name": name})
            strategy = Strategy(name, optimizer=spec)
            laboratory.prepare(strategy, "python")
            for rate in RATES[name]:
                phase = Phase("scratch", "python", 1.0, rate, COSINE)
                for seed in range(arguments.seeds):
                    outcome, _ = laboratory.train(strategy, phase, seed, laboratory.start(seed), arguments.steps)
                    rows.append(
                        {
                            "architecture": architecture,
                            "parameters": parameters,
                            "optimizer": name,
                            "learning_rate": rate,
                            "seed": seed,
                            "steps": outcome.steps,
                            "tokens": outcome.tokens,
                            "loss": outcome.loss,
                            "step_ms": outcome.seconds / outcome.steps * 1e3,
                            "device": device_name(),
                        }
                    )
                    print(f"{architecture} {name} at {rate:g}: {outcome.loss:.4f}", flush=True)
    return rows


def main() -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["updates", "losses"])
    parser.add_argument("--repeats", type=int, default=15, help="updates that are measured")
    parser.add_argument("--architecture", nargs="+", choices=["Transformer", "Resonate"], default=["Transformer"])
    parser.add_argument("--optimizer", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--steps", type=int, default=300, help="of a run of losses")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a toy model, to try the script out")
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="file with the corpus")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory for the JSON file")
    arguments = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64
    if arguments.what == "updates":
        rows = [row for shape in SHAPES[device.type] for row in measure_updates(shape, device, arguments.repeats)]
        name, alike = "optimizer_updates", ("device",)
    else:
        if not arguments.corpus.exists():
            parser.error(f"--corpus: {arguments.corpus} is not there; write it with gate_quality.py --prepare")
        rows = measure_losses(arguments, device)
        name, alike = "optimizer_losses", ("device", "architecture", "parameters", "optimizer", "steps")
    print_table(rows)
    measured = {tuple(row[key] for key in alike) for row in rows}
    kept = [row for row in read_rows(name, arguments.results) if tuple(row[key] for key in alike) not in measured]
    write_results(name, kept + rows, arguments.results, timing="median of updates; seconds of whole runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
