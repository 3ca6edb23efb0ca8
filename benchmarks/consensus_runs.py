"""One training run of the benchmark of exchanges, by a recipe: from fresh weights to held-out loss, with its bytes."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from consensus_link import REPEATS, RecordingWorld, Transport, alone_ms
from measure import Mark
from python_corpus import VOCABULARY, read_corpus
from torch import Tensor

from pylon_api.training import (
    Compile,
    ConsensusCodec,
    ConsensusSpec,
    DataSpec,
    Disagreement,
    ModelSpec,
    OptimizerSpec,
    Precision,
    ScheduleSpec,
    TrainingSpec,
)
from pylon_trainer.consensus import Exchange
from pylon_trainer.consensus.agreement import Agreement
from pylon_trainer.consensus.build import build_exchange
from pylon_trainer.consensus.compressed import CompressedExchange
from pylon_trainer.consensus.local_steps import LocalSteps
from pylon_trainer.gating import build_step
from pylon_trainer.models import build_model
from pylon_trainer.optim.optimizer import Optimizer, named_gradients
from pylon_trainer.optim.schedule import learning_rate_ratio
from pylon_trainer.step import Batch, TrainingStep


@dataclass(frozen=True)
class Scale:
    """Model, batch and budget."""

    model: dict[str, Any]
    sequences: int
    """Of all ranks."""
    tokens: int
    """Of a sequence."""
    steps: int
    bytes_per_step: int
    learning_rate: float
    held_out: int | None = None
    """Sequences to tell the loss on; None for all."""


SCALES = {
    "small": Scale({"layers": 2, "hidden_size": 64, "heads": 4}, 8, 64, 200, 24_000, 3e-3, 128),
    "host": Scale({"layers": 4, "hidden_size": 128, "heads": 4}, 8, 128, 400, 40_000, 3e-3, 128),
    "medium": Scale({"layers": 12, "hidden_size": 640, "heads": 10}, 64, 512, 2000, 1_200_000, 1e-3),
    "large": Scale({"layers": 12, "hidden_size": 896, "heads": 14}, 64, 512, 2000, 2_000_000, 6e-4),
    "resonate": Scale(
        {
            "architecture": "Resonate",
            "layers": 10,
            "hidden_size": 640,
            "heads": 10,
            "resonate": {"attention_every": 10},
        },
        *(64, 512, 2000, 1_200_000, 1e-3),
    ),
}
"""65 and 124 million parameters, two for machines without a GPU, 0.6 and 1.9 million, and 63 million of Resonate."""


@dataclass(frozen=True)
class Recipe:
    """One way to train on many ranks."""

    consensus: ConsensusSpec
    optimizer: OptimizerSpec
    rate: float
    """Share of the learning rate."""


def read_recipe(text: str) -> Recipe:
    """`Codec,field=value,...`. ValueError for what no spec knows."""
    codec, *assigned = text.split(",")
    fields: dict[str, Any] = {name: value for name, _, value in (field.partition("=") for field in assigned)}
    optimizer = {"name": fields.pop("optimizer", "AdamW")}
    optimizer |= {name: float(fields.pop(name)) for name in ("beta1", "beta2") if name in fields}
    rate = float(fields.pop("rate", 1))
    consensus = {"codec": codec} | {name: float(value) for name, value in fields.items()}
    return Recipe(ConsensusSpec.model_validate(consensus), OptimizerSpec.model_validate(optimizer), rate)


class Laboratory:
    """One model, trained anew for every run."""

    def __init__(
        self, world: RecordingWorld, scale: Scale, compile: Compile, late_rate: float, corpus_path: Path
    ) -> None:
        """late_rate: share of the learning rate for codecs whose sums are gathered over many steps."""
        self._world, self._transport, self._device = world, Transport(world.size), world.device
        self._scale, self._compile, self._late_rate = scale, compile, late_rate
        spec = ModelSpec.model_validate(scale.model)
        torch.manual_seed(0)
        self._model = build_model(spec, vocab_size=VOCABULARY).to(world.device)
        self._parameters = dict(self._model.named_parameters())
        training = self._training(read_recipe("Exact"))
        self._training_step: TrainingStep = build_step(self._model, training, world.device)
        corpus = read_corpus(corpus_path)
        self._windows = {split: self._cut(corpus[f"python_{split}"]) for split in ("train", "held_out")}

    def run(self, recipe: Recipe, seed: int) -> dict[str, Any]:
        """Train from fresh weights, and say what it took and gave."""
        scale, world = self._scale, self._world
        training = self._training(recipe)
        self._restart(seed)
        optimizer = Optimizer(self._parameters, training.optimizer)
        exchange = build_exchange(world, training, self._parameters)
        replicas = exchange.replicas or {**self._parameters, **optimizer.tensors}
        agreement = Agreement(world, replicas, Disagreement.STOP)
        peak_rate = scale.learning_rate * recipe.rate * (self._late_rate if exchange.smoothed else 1)
        begin = world.traffic.bytes, self._transport.sent_bytes
        step_bytes, step_ms, exchange_ms = [], [], []
        for step, batch in zip(range(scale.steps), self._batches(seed), strict=False):
            before_bytes = world.traffic.bytes
            world.calls.clear()
            marks = [Mark(self._device)]
            tokens, _ = world.agree(batch.labels_BT.numel(), 0)
            self._training_step.forward_backward(batch, global_tokens=tokens, step=step)
            marks += [Mark(self._device)]
            exchange.exchange(named_gradients(self._parameters))
            marks += [Mark(self._device)]
            rate = learning_rate_ratio(training.schedule, step, scale.steps)
            optimizer.update(peak_rate * rate, smoothed=exchange.smoothed)
            marks += [Mark(self._device)]
            exchange.after_update(is_last=step + 1 == scale.steps)
            marks += [Mark(self._device)]
            for parameter in self._parameters.values():
                parameter.grad = None
            calls = list(world.calls)
            if (step + 1) % training.consensus.hash_check_steps == 0:
                agreement.check()
            step_bytes.append(world.traffic.bytes - before_bytes)
            if step >= scale.steps - REPEATS:
                marks[-1].wait()
                step_ms.append(marks[0].milliseconds_to(marks[4]))
                exchange_ms.append(marks[1].milliseconds_to(marks[2]) + marks[3].milliseconds_to(marks[4]))
        parameters = sum(parameter.numel() for parameter in self._parameters.values())
        mean_bytes, ms = statistics.mean(step_bytes), statistics.median(step_ms)
        consensus = recipe.consensus
        return {
            "codec": str(consensus.codec),
            "local_steps": consensus.local_steps,
            "outer_rate": consensus.outer_rate if consensus.local_steps > 1 else None,
            "outer_momentum": consensus.outer_momentum if consensus.local_steps > 1 else None,
            "optimizer": str(recipe.optimizer.name),
            "beta2": recipe.optimizer.beta2,
            "architecture": self._model.spec.architecture.lower(),
            "ranks": world.size,
            "device": self._device.type,
            "parameters": parameters,
            "bytes_per_step_mean": mean_bytes,
            "bytes_per_step_median": statistics.median(step_bytes),
            "bytes_per_step_peak": max(step_bytes),
            "counted_bytes": world.traffic.bytes - begin[0],
            "counted_by_transport": self._transport.sent_bytes - begin[1],
            "below_bf16_ddp": 4 * parameters * (world.size - 1) / world.size / mean_bytes,
            "loss": self._held_out_loss(),
            "is_exact": consensus.codec is ConsensusCodec.EXACT and consensus.local_steps == 1,
            "seed": seed,
            "steps": scale.steps,
            "tokens": scale.steps * scale.sequences * scale.tokens,
            "learning_rate": peak_rate,
            "step_ms": ms,
            "exchange_fraction": statistics.median(exchange_ms) / ms,
            "communication_fraction": alone_ms(world, calls) / ms,
            "channels": _channels(exchange),
        }

    def _training(self, recipe: Recipe) -> TrainingSpec:
        scale, consensus = self._scale, recipe.consensus
        if consensus.bytes_per_step is None and consensus.codec.fills_budget:
            consensus = consensus.model_copy(update={"bytes_per_step": scale.bytes_per_step})
        return TrainingSpec(
            data=DataSpec(train=["unused"]),
            optimizer=recipe.optimizer,
            schedule=ScheduleSpec(steps=scale.steps, warmup_steps=scale.steps // 20),
            precision=Precision.BFLOAT16 if self._device.type == "cuda" else Precision.FLOAT32,
            compile=self._compile,
            consensus=consensus,
        )

    @torch.no_grad()
    def _restart(self, seed: int) -> None:
        torch.manual_seed(seed)
        fresh = build_model(ModelSpec.model_validate(self._scale.model), vocab_size=VOCABULARY)
        for name, parameter in fresh.named_parameters():
            self._parameters[name].copy_(parameter)

    def _cut(self, ids: Any) -> Tensor:
        width = self._scale.tokens + 1
        return torch.from_numpy(ids[: len(ids) // width * width].astype("int32")).view(-1, width).to(self._device)

    def _batches(self, seed: int) -> Iterator[Batch]:
        """This rank's part of every step's sequences, in an order drawn from the seed, epoch after epoch."""
        windows_WT, world = self._windows["train"], self._world
        draw = torch.Generator().manual_seed(seed)
        while True:
            for step_S in torch.randperm(len(windows_WT), generator=draw).split(self._scale.sequences):
                if len(step_S) == self._scale.sequences:
                    yield _batch(windows_WT[step_S[world.rank :: world.size].to(self._device)])

    def _held_out_loss(self) -> float:
        """Of every rank's share, summed."""
        sequences = self._scale.sequences // self._world.size
        windows_WT = self._windows["held_out"][: self._scale.held_out][self._world.rank :: self._world.size]
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        for part_BT in windows_WT[: len(windows_WT) // sequences * sequences].split(sequences):
            result = self._training_step.evaluate(_batch(part_BT))
            sums += torch.stack([result.loss_sum.double(), result.tokens.double()])
        loss_sum, tokens = self._world.sum(sums).tolist()
        return float(loss_sum / tokens)


def _channels(exchange: Exchange) -> str:
    if isinstance(exchange, CompressedExchange | LocalSteps):
        return ", ".join(f"{kind} {name}" for kind, name in exchange.channels.items())
    return "all Float32"


def _batch(windows_BT: Tensor) -> Batch:
    windows_BT = windows_BT.long()
    return Batch(windows_BT[:, :-1].contiguous(), windows_BT[:, 1:].contiguous())
