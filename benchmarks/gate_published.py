"""Sequence-level gating of a Hugging Face model: the published `cggr` 0.5.0 beside Pylon's module of the same name.

    pip install --no-deps --target cggr-0.5.0 cggr==0.5.0
    python benchmarks/gate_published.py --published cggr-0.5.0

Both score every sequence by the model's lowest four blocks and train on the hardest quarter, on the same Llama shape.
The published one runs as it is, and with the model's layers compiled, which is what a user would try; Pylon's with and
without too, and the whole batch for comparison. A step is forward, backward and fused AdamW; all take turns. A
contender that fails costs only itself: it is named, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, Mark, device_name, host_syncs, publish
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

RATIO = 0.25
ROUTER_LAYERS = 4
GOAL = 1.15
ROUNDS = 6
STEPS_OF_TURN = 4
"""The first step of a turn waits for its first kernels to be launched and is not counted."""

SHAPES: dict[str, tuple[dict[str, Any], int, int]] = {
    "cpu": ({"num_hidden_layers": 8, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 512}, 8, 64),
    "cuda": (
        {
            "num_hidden_layers": 20,
            "hidden_size": 2048,
            "num_attention_heads": 16,
            "intermediate_size": 5632,
            "vocab_size": 49152,
        },
        8,
        2048,
    ),
}
"""By device: fields of LlamaConfig, sequences, tokens of a sequence."""

Wrapped = Any
"""A module that takes input_ids and labels and gives a loss, with a `step` to call after the optimizer's."""


@dataclass
class Contender:
    name: str
    compiles: bool
    wrapped: Wrapped
    optimizer: torch.optim.Optimizer
    step_ms: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    syncs: int | None = None

    def step(self, ids_BT: Tensor) -> None:
        loss = self.wrapped(ids_BT, labels=ids_BT)
        getattr(loss, "loss", loss).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if hasattr(self.wrapped, "step"):
            self.wrapped.step()

    def warm_up(self, ids_BT: Tensor) -> None:
        start = time.perf_counter()
        for _ in range(4):
            self.step(ids_BT)
        if ids_BT.is_cuda:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.step(ids_BT)
            self.peak_bytes = torch.cuda.max_memory_allocated() - before
            self.syncs = host_syncs(lambda: self.step(ids_BT))
        print(f"  {self.name}: warm after {time.perf_counter() - start:.1f} s", flush=True)

    def take_turn(self, ids_BT: Tensor) -> None:
        marks = []
        for _ in range(STEPS_OF_TURN):
            marks.append(Mark(ids_BT.device))
            self.step(ids_BT)
        marks.append(Mark(ids_BT.device))
        marks[-1].wait()
        self.step_ms += [begin.milliseconds_to(end) for begin, end in itertools.pairwise(marks[1:])]


def published(model: LlamaForCausalLM) -> Wrapped:
    from cggr import CGGRModel, create_truncated_router

    router = create_truncated_router(model, num_layers=ROUTER_LAYERS)
    return CGGRModel(model, router=router, min_tokens_ratio=RATIO, warmup_steps=0, dynamic_threshold=False)


def ours(model: LlamaForCausalLM) -> Wrapped:
    from pylon_trainer.cggr import CGGRModel, create_truncated_router

    router = create_truncated_router(model, num_layers=ROUTER_LAYERS)
    return CGGRModel(
        model,
        router=router,
        min_tokens_ratio=RATIO,
        warmup_steps=0,
        dynamic_threshold=False,
        granularity="sequence",
    )


CONTENDERS: dict[str, tuple[Callable[[LlamaForCausalLM], Wrapped], bool]] = {
    "published, as it is": (published, False),
    "published, layers compiled": (published, True),
    "Pylon": (ours, False),
    "Pylon, layers compiled": (ours, True),
    "whole batch, layers compiled": (lambda model: model, True),
}
"""What wraps the model, and whether its layers are compiled."""


def build(name: str, device: torch.device) -> Contender:
    """A model of its own with the same weights as all others."""
    wrap, compiles = CONTENDERS[name]
    fields, _, tokens = SHAPES[device.type]
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=tokens, use_cache=False, **fields)).train()
    if device.type == "cuda":
        model.bfloat16()
    if compiles:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    wrapped = wrap(model).train()
    return Contender(name, compiles, wrapped, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True))


def measure(device: torch.device) -> tuple[list[Contender], list[str]]:
    """All contenders that came through, and the names of those that did not."""
    fields, sequences, tokens = SHAPES[device.type]
    ids_BT = torch.randint(fields["vocab_size"], (sequences, tokens), device=device)
    contenders, failures = [], []
    for name, (_, compiles) in CONTENDERS.items():
        if compiles and device.type == "cpu":
            continue  # a toy, to try the script out
        try:
            contender = build(name, device)
            contender.warm_up(ids_BT)
        except Exception:  # whatever one dies of must not cost the device time of the others
            print(f"  {name} failed:\n{traceback.format_exc()}", flush=True)
            failures.append(name)
            gc.collect()
            continue
        contenders.append(contender)
    for _ in range(ROUNDS):
        for contender in contenders:
            contender.take_turn(ids_BT)
    return contenders, failures


def rows_of(contenders: list[Contender], device: torch.device) -> list[dict[str, Any]]:
    _, sequences, tokens = SHAPES[device.type]
    medians = {contender.name: statistics.median(contender.step_ms) for contender in contenders}
    published_ms = [medians.get(name) for name in CONTENDERS if name.startswith("published")]
    # The better of the two is not known when one has failed.
    best_published = None if None in published_ms else min(published_ms)
    return [
        {
            "shape": "1.17B" if device.type == "cuda" else "toy",
            "device": device_name(),
            "contender": contender.name,
            "granularity": "batch" if contender.name.startswith("whole") else "sequence",
            "ratio": 1.0 if contender.name.startswith("whole") else RATIO,
            "step_ms": medians[contender.name],
            "tokens_per_s": sequences * tokens / medians[contender.name] * 1e3,
            "speedup_vs_published": best_published / medians[contender.name] if best_published else None,
            "peak_bytes": contender.peak_bytes,
            "syncs": contender.syncs,
        }
        for contender in contenders
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure sequence-level gating beside the published cggr 0.5.0.")
    parser.add_argument("--published", type=Path, help="directory that holds cggr 0.5.0, where it is not installed")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory for the JSON file")
    arguments = parser.parse_args()
    if arguments.published:
        sys.path.insert(0, str(arguments.published))
    torch._dynamo.config.recompile_limit = 64
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    contenders, failures = measure(device)
    rows = rows_of(contenders, device)
    if rows:
        publish("gate_published", rows, arguments.results, timing="median over rounds in which all take turns")
    own = [row["speedup_vs_published"] for row in rows if row["contender"].startswith("Pylon")]
    if own and None not in own:
        print(f"Pylon against the better published one: {max(own):.2f}x, goal {GOAL}x")
    if failures:
        print(f"failed: {', '.join(failures)}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
