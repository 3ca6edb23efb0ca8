"""The price of cutting gradients between tokens: how far each engine's gradient is from the plain step's.

    python benchmarks/gate_bias.py [--steps 400]

A small byte-level model learns the standard library's sources first, since a fresh one says nothing. Then the same
batches are drawn again and again by the sampled gate. `relative_error` is a draw's distance to the plain gradient, as a
share of its norm; `bias` is what is left of it in the mean over all draws, sampling noise taken out. `fidelity` is the
cosine to the plain gradient as a share of HeadOnly's, which cuts nothing: what an engine loses beyond the noise of the
draws. gating/ratio.py discounts gated steps by it.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measure import RESULTS, print_table, write_results
from torch import Tensor

from pylon_api.training import DataSpec, GatingSpec, ModelSpec, OptimizerSpec, Precision, ScheduleSpec, TrainingSpec
from pylon_trainer.gating import build_step
from pylon_trainer.models import Transformer, build_model
from pylon_trainer.optim.optimizer import Optimizer
from pylon_trainer.step import Batch, TrainingStep

MODEL = ModelSpec(layers=6, hidden_size=192, heads=6)
SEQUENCES, TOKENS = 8, 256
LEARNING_RATE = 2e-3
ENGINES: dict[str, dict[str, Any]] = {
    "HeadOnly": {"engine": "HeadOnly"},
    "SinglePass Truncated": {"engine": "SinglePass"},
    "SinglePass Dense": {"engine": "SinglePass", "kv_gradient": "Dense"},
}
RATIOS = (0.75, 0.5, 0.25, 0.125)
BATCHES, DRAWS = 3, 16


def read_bytes() -> np.ndarray[Any, Any]:
    """8 MB of the standard library, files in an order that does not change."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*/*.py")) + sorted(
        Path(sysconfig.get_path("stdlib")).glob("*.py")
    )
    files = [file for file in files if "test" not in str(file)]
    random.Random(0).shuffle(files)
    return np.frombuffer(b"\0".join(file.read_bytes() for file in files)[:8_000_000], dtype=np.uint8)


def batch_of(data: np.ndarray[Any, Any], number: int) -> Batch:
    starts = np.random.default_rng(number).integers(0, len(data) - TOKENS - 1, SEQUENCES)
    tokens_BT = torch.from_numpy(np.stack([data[start : start + TOKENS + 1] for start in starts]).astype(np.int64))
    return Batch(tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous())


def step_of(model: Transformer, gating: dict[str, Any]) -> TrainingStep:
    training = TrainingSpec(
        data=DataSpec(train=["unused"]),
        schedule=ScheduleSpec(steps=1),
        precision=Precision.FLOAT32,
        gating=GatingSpec.model_validate(gating),
    )
    return build_step(model, training, torch.device("cpu"))


def pretrain(model: Transformer, data: np.ndarray[Any, Any], steps: int) -> None:
    plain, optimizer = step_of(model, {}), Optimizer(dict(model.named_parameters()), OptimizerSpec())
    for number in range(steps):
        result = plain.forward_backward(batch_of(data, number), global_tokens=SEQUENCES * TOKENS, step=number)
        optimizer.update(LEARNING_RATE * min(1.0, (number + 1) / 30) * (1 - 0.9 * number / steps))
        model.zero_grad()
        if number % 50 == 0:
            print(f"step {number} of {steps}: loss {float(result.loss_sum) / SEQUENCES / TOKENS:.3f}", flush=True)


def gradient(step: TrainingStep, batch: Batch, number: int) -> Tensor:
    step.model.zero_grad()
    step.forward_backward(batch, global_tokens=SEQUENCES * TOKENS, step=number)
    return torch.cat([p.grad.flatten() for p in step.model.parameters() if p.grad is not None])


def compare(model: Transformer, data: np.ndarray[Any, Any]) -> Iterator[dict[str, Any]]:
    """One row of every engine and ratio."""
    batches = [batch_of(data, 10_000_000 + number) for number in range(BATCHES)]
    whole = [gradient(step_of(model, {}), batch, 0) for batch in batches]
    exact: dict[float, float] = {}
    for name, fields in ENGINES.items():
        for ratio in RATIOS:
            gate = {"strategy": "GradientNorm", "ratio_control": "Fixed", "token_ratio": ratio} | fields
            step = step_of(model, gate)
            cosines, errors, biases = [], [], []
            for batch, plain in zip(batches, whole, strict=True):
                draws = torch.stack([gradient(step, batch, number) for number in range(DRAWS)])
                cosines += F.cosine_similarity(draws, plain[None]).tolist()
                errors += ((draws - plain).norm(dim=1) / plain.norm()).tolist()
                noise = float(draws.var(dim=0).sum()) / DRAWS
                biases.append(
                    max(0.0, float((draws.mean(0) - plain).square().sum()) - noise) ** 0.5 / float(plain.norm())
                )
            cosine = statistics.mean(cosines)
            exact.setdefault(ratio, cosine)  # HeadOnly comes first
            yield {
                "engine": name,
                "ratio": ratio,
                "cosine": cosine,
                "relative_error": statistics.mean(errors),
                "bias": statistics.mean(biases),
                "fidelity": cosine / exact[ratio],
            }
            print(f"{name} {ratio}: cosine {cosine:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how far gated gradients are from plain ones.")
    parser.add_argument("--steps", type=int, default=400, help="of pretraining")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory for the JSON file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model, data = build_model(MODEL, vocab_size=257), read_bytes()
    pretrain(model, data, arguments.steps)
    rows = list(compare(model, data))
    print_table(rows)
    write_results("gate_bias", rows, arguments.results, pretraining_steps=arguments.steps)


if __name__ == "__main__":
    main()
