"""Bytes and loss of every way to exchange, at equal tokens, against the exact sum.

    python benchmarks/gate_quality.py --prepare                   # once: the corpus, minutes on a CPU
    python benchmarks/consensus.py [--ranks 2]                    # trains; adds to the results that are there
    python benchmarks/consensus.py --recipes Dct Int4,localSteps=32,outerRate=0.9 --seeds 0 1
    python benchmarks/consensus.py --scale small                  # gloo on CPUs, minutes

A recipe is a codec with fields of `training.consensus`, and of these: `rate`, its learning rate as a share of the
others', `beta1` and `beta2`, its optimizer's. With `beta1=0,beta2=0` AdamW moves by the sign of what got through, as
DeMo does. Every run of a seed starts from the same weights, sees the same tokens in the same steps and has the same
schedule, with a lower peak (--late-rate) for codecs whose sums are gathered over many steps. `exact_loss` is the lowest
of the seed's exact runs, whatever their rates.

Bytes are all that a rank of the trainer moves in a step: gradients or weights, whether they are finite, tokens and
stops, hashes. `counted_by_transport` is their sum over a run as handed to torch.distributed, `counted_bytes` the
trainer's own count. `below_bf16_ddp` is how many times fewer the mean is than a ring all-reduce of gradients in
bfloat16. `communication_fraction` is the time of a step's collectives alone, repeated without anything between them, of
a step's. Projections to more ranks (consensus_projection.json) are arithmetic, not measurements: alpha for each hop of
a ring and beta for each byte, both fitted to collectives of this machine or given.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measure import RESULTS, Mark, print_table, read_rows, write_results
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
from pylon_trainer.consensus.compressed import CALIBRATION_STEPS, CompressedExchange
from pylon_trainer.consensus.local_steps import LocalSteps
from pylon_trainer.gating import build_step
from pylon_trainer.models import build_model
from pylon_trainer.optim.adamw import AdamW, named_gradients
from pylon_trainer.optim.schedule import learning_rate_ratio
from pylon_trainer.runtime.distributed import World
from pylon_trainer.step import Batch, TrainingStep

CORPUS = Path(__file__).parents[1] / ".cache" / "python_corpus.npz"
PROJECTED_RANKS = (8, 64, 1024)
REPEATS = 20
KEY = (
    *("codec", "local_steps", "outer_rate", "outer_momentum", "beta2", "learning_rate", "channels"),
    *("ranks", "device", "parameters", "steps", "tokens", "seed"),
)
"""What tells runs apart."""
_UNSIZED = (ConsensusCodec.EXACT, ConsensusCodec.INT8, ConsensusCodec.INT4)
DEFAULT_RECIPES = (
    "Exact",
    "Int4,localSteps=32",
    "Int4,localSteps=16",
    "Int8,localSteps=32",
    "Int8",
    "Int4",
    "Auto",
    "Dct",
    "Dct,beta1=0,beta2=0,rate=0.3",
    "Dct,localSteps=4,outerRate=1,outerMomentum=0",
)


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
}
"""64 and 123 million parameters, and two for machines without a GPU: 0.6 and 1.8 million."""


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
    fields = {name: float(value) for name, value in (field.split("=") for field in assigned)}
    rate, moments = fields.pop("rate", 1.0), {name: fields.pop(name) for name in ("beta1", "beta2") if name in fields}
    return Recipe(ConsensusSpec.model_validate({"codec": codec, **fields}), OptimizerSpec.model_validate(moments), rate)


@dataclass(frozen=True)
class RecordingWorld(World):
    """Notes what collectives of a step are called with, so that they can be repeated alone."""

    calls: list[Callable[[], object]] = field(default_factory=list)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """See World."""
        self.calls.append(partial(World.all_gather, self, tensor))
        return super().all_gather(tensor)

    def all_to_all(self, tensor: Tensor) -> Tensor:
        """See World."""
        self.calls.append(partial(World.all_to_all, self, tensor))
        return super().all_to_all(tensor)

    def _reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
        if tensor.device == self.device:  # what the host says over gloo goes on beside the device's work
            self.calls.append(partial(World._reduce, self, tensor, operation))
        super()._reduce(tensor, operation)


@dataclass(frozen=True)
class Task:
    """What one call of this script does on every rank."""

    scale: Scale
    recipes: list[str]
    seeds: list[int]
    compile: Compile
    late_rate: float
    minutes: float | None
    alpha_us: float | None
    gigabytes_per_s: float | None
    corpus: Path
    results: Path


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--scale", choices=SCALES, default="medium" if torch.cuda.is_available() else "small")
    parser.add_argument("--recipes", nargs="+", default=DEFAULT_RECIPES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, help="optimizer steps of a run")
    parser.add_argument("--sequences", type=int, help="of a step, over all ranks")
    parser.add_argument("--bytes-per-step", type=int, help="budget of the codecs that have a size")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument(
        "--late-rate", type=float, default=1 / 3, help="of codecs that sum over steps, as a share of the learning rate"
    )
    parser.add_argument("--minutes", type=float, help="begin no run that would end after this long")
    compile = Compile.DEFAULT if torch.cuda.is_available() else Compile.OFF
    parser.add_argument("--compile", choices=[*Compile], default=compile)
    parser.add_argument("--alpha-us", type=float, help="latency of a hop for the projection; fitted when left out")
    parser.add_argument("--gigabytes-per-s", type=float, help="bandwidth for the projection; fitted when left out")
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    changes = {
        "steps": given.steps,
        "sequences": given.sequences,
        "bytes_per_step": given.bytes_per_step,
        "learning_rate": given.learning_rate,
    }
    scale = replace(SCALES[given.scale], **{name: value for name, value in changes.items() if value is not None})
    recipes = [*given.recipes] if any(is_exact(text) for text in given.recipes) else ["Exact", *given.recipes]
    task = Task(
        scale,
        sorted(recipes, key=lambda text: not is_exact(text)),
        given.seeds,
        Compile(given.compile),
        given.late_rate,
        given.minutes,
        given.alpha_us,
        given.gigabytes_per_s,
        given.corpus,
        given.results,
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(take_part, (given.ranks, port, task), nprocs=given.ranks)


def is_exact(text: str) -> bool:
    """Whether a recipe sums gradients exactly: what others are held against."""
    consensus = read_recipe(text).consensus
    return consensus.codec is ConsensusCodec.EXACT and consensus.local_steps == 1


def take_part(rank: int, ranks: int, port: int, task: Task) -> None:
    """One rank's part in all runs."""
    begin_s = time.monotonic()
    is_on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if is_on_gpu else torch.device("cpu")
    if is_on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    backend = "cpu:gloo,cuda:nccl" if is_on_gpu else "gloo"
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # of no use to two GPUs, and not allowed everywhere
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    world = RecordingWorld(rank, ranks, rank, device)
    transport = Transport(ranks)
    laboratory = Laboratory(task, world, transport)
    alpha_s, beta_s = fit_link(world)
    alpha_s = alpha_s if task.alpha_us is None else task.alpha_us / 1e6
    beta_s = beta_s if task.gigabytes_per_s is None else 1 / (task.gigabytes_per_s * 1e9)
    rows: list[dict[str, Any]] = []
    last_s = 0.0
    for seed, text in ((seed, text) for seed in task.seeds for text in task.recipes):
        run_begins_s = time.monotonic()
        is_too_late = task.minutes is not None and run_begins_s - begin_s + last_s > 60 * task.minutes
        if any(world.gather(is_too_late)):
            break
        row = laboratory.run(read_recipe(text), seed)
        last_s = time.monotonic() - run_begins_s
        exact_losses = [other["loss"] for other in (*rows, row) if other["seed"] == seed and other["is_exact"]]
        row |= {"exact_loss": min(exact_losses), "above_exact": row["loss"] / min(exact_losses) - 1}
        rows.append(row)
        if rank == 0:
            print(f"{time.monotonic() - begin_s:.0f} s, {text}: {row}", flush=True)
            publish(rows, task.results)
            project(rows, alpha_s, beta_s, task.results)
    if rank == 0:
        print_table([{k: v for k, v in row.items() if k != "channels"} for row in rows])
    dist.destroy_process_group()


class Transport:
    """Counts the bytes that a rank hands to torch.distributed for its peers, by what each collective sends."""

    def __init__(self, ranks: int) -> None:
        self.sent_bytes = 0
        gather, exchange, reduce = dist.all_gather_into_tensor, dist.all_to_all_single, dist.all_reduce

        def counting_gather(output: Tensor, own: Tensor) -> None:
            self.sent_bytes += output.nbytes - own.nbytes
            gather(output, own)

        def counting_exchange(output: Tensor, own: Tensor) -> None:
            self.sent_bytes += sum(part.nbytes for part in own.chunk(ranks)[1:])
            exchange(output, own)

        def counting_reduce(tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
            self.sent_bytes += 2 * tensor.nbytes * (ranks - 1) // ranks
            reduce(tensor, operation)

        dist.all_gather_into_tensor, dist.all_to_all_single, dist.all_reduce = (
            counting_gather,
            counting_exchange,
            counting_reduce,
        )


class Laboratory:
    """One model, trained anew for every run."""

    def __init__(self, task: Task, world: RecordingWorld, transport: Transport) -> None:
        self._task, self._world, self._transport, self._device = task, world, transport, world.device
        spec = ModelSpec.model_validate(task.scale.model)
        torch.manual_seed(0)
        self._model = build_model(spec, vocab_size=VOCABULARY).to(world.device)
        self._parameters = dict(self._model.named_parameters())
        training = self._training(read_recipe("Exact"))
        self._training_step: TrainingStep = build_step(self._model, training, world.device)
        corpus = read_corpus(task.corpus)
        self._windows = {split: self._cut(corpus[f"python_{split}"]) for split in ("train", "held_out")}

    def run(self, recipe: Recipe, seed: int) -> dict[str, Any]:
        """Train from fresh weights, and say what it took and gave."""
        scale, world = self._task.scale, self._world
        training = self._training(recipe)
        self._restart(seed)
        optimizer = AdamW(self._parameters, training.optimizer)
        exchange = build_exchange(world, training, self._parameters)
        replicas = exchange.replicas or {**self._parameters, **optimizer.tensors}
        agreement = Agreement(world, replicas, Disagreement.STOP)
        peak_rate = scale.learning_rate * recipe.rate * (self._task.late_rate if exchange.smoothed else 1)
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
            "beta2": recipe.optimizer.beta2,
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
            "communication_fraction": self._communication_ms() / ms,
            "channels": _channels(exchange),
        }

    def _communication_ms(self) -> float:
        """The collectives of the last step, alone."""
        calls, times_ms = list(self._world.calls), []
        for _ in range(REPEATS):
            dist.barrier()
            begin = Mark(self._device)
            for call in calls:
                call()
            end = Mark(self._device)
            end.wait()
            times_ms.append(begin.milliseconds_to(end))
        return statistics.median(times_ms)

    def _training(self, recipe: Recipe) -> TrainingSpec:
        scale, consensus = self._task.scale, recipe.consensus
        if consensus.bytes_per_step is None and consensus.codec not in _UNSIZED:
            consensus = consensus.model_copy(update={"bytes_per_step": scale.bytes_per_step})
        return TrainingSpec(
            data=DataSpec(train=["unused"]),
            optimizer=recipe.optimizer,
            schedule=ScheduleSpec(steps=scale.steps, warmup_steps=scale.steps // 20),
            precision=Precision.BFLOAT16 if self._device.type == "cuda" else Precision.FLOAT32,
            compile=self._task.compile,
            consensus=consensus,
        )

    @torch.no_grad()
    def _restart(self, seed: int) -> None:
        torch.manual_seed(seed)
        fresh = build_model(ModelSpec.model_validate(self._task.scale.model), vocab_size=VOCABULARY)
        for name, parameter in fresh.named_parameters():
            self._parameters[name].copy_(parameter)

    def _cut(self, ids: Any) -> Tensor:
        width = self._task.scale.tokens + 1
        return torch.from_numpy(ids[: len(ids) // width * width].astype("int32")).view(-1, width).to(self._device)

    def _batches(self, seed: int) -> Iterator[Batch]:
        """This rank's part of every step's sequences, in an order drawn from the seed, epoch after epoch."""
        windows_WT, world = self._windows["train"], self._world
        draw = torch.Generator().manual_seed(seed)
        while True:
            for step_S in torch.randperm(len(windows_WT), generator=draw).split(self._task.scale.sequences):
                if len(step_S) == self._task.scale.sequences:
                    yield _batch(windows_WT[step_S[world.rank :: world.size].to(self._device)])

    def _held_out_loss(self) -> float:
        """Of every rank's share, summed."""
        sequences = self._task.scale.sequences // self._world.size
        windows_WT = self._windows["held_out"][: self._task.scale.held_out][self._world.rank :: self._world.size]
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        for part_BT in windows_WT[: len(windows_WT) // sequences * sequences].split(sequences):
            result = self._training_step.evaluate(_batch(part_BT))
            sums += torch.stack([result.loss_sum.double(), result.tokens.double()])
        loss_sum, tokens = self._world.sum(sums).tolist()
        return float(loss_sum / tokens)


def fit_link(world: World) -> tuple[float, float]:
    """Seconds of a hop and of a byte: a line through the times of all-gathers of few and of many bytes."""
    points = []
    for size_bytes in (2**10, 2**25 if world.device.type == "cuda" else 2**21):
        own = torch.zeros(size_bytes, dtype=torch.uint8, device=world.device)
        times_ms = []
        for _ in range(REPEATS):
            dist.barrier()
            begin = Mark(world.device)
            world.all_gather(own)
            end = Mark(world.device)
            end.wait()
            times_ms.append(begin.milliseconds_to(end))
        points.append((size_bytes * (world.size - 1), statistics.median(times_ms) / 1e3))
    (few_bytes, few_s), (many_bytes, many_s) = points
    beta_s = (many_s - few_s) / (many_bytes - few_bytes)
    return max(0.0, few_s - beta_s * few_bytes) / (world.size - 1), beta_s


def project(rows: list[dict[str, Any]], alpha_s: float, beta_s: float, directory: Path) -> None:
    """What collectives would take on more ranks, by arithmetic: two for each channel, n - 1 hops in each.

    Of the first seed's runs; `of_step_now` is a share of the step measured on the ranks there are.
    """
    projected = []
    for row in (row for row in rows if row["seed"] == rows[0]["seed"]):
        collectives = 2 * len(row["channels"].split(", "))
        for ranks in PROJECTED_RANKS:
            moved_bytes = row["bytes_per_step_mean"] * _share(ranks) / _share(row["ranks"])
            seconds = collectives * alpha_s * (ranks - 1) + beta_s * moved_bytes
            projected.append(
                {
                    "projection": True,
                    "codec": row["codec"],
                    "local_steps": row["local_steps"],
                    "parameters": row["parameters"],
                    "ranks": ranks,
                    "bytes_per_step": int(moved_bytes),
                    "communication_ms": seconds * 1e3,
                    "of_step_now": seconds * 1e3 / row["step_ms"],
                    "alpha_us": alpha_s * 1e6,
                    "gigabytes_per_s": 1e-9 / beta_s,
                }
            )
    write_results("consensus_projection", projected, directory, note="arithmetic from measured bytes, not measured")


def _share(ranks: int) -> float:
    """Bytes of a rank, in payloads: exchanges between two ranks move one payload, among n 2 (n - 1) / n."""
    return 2 * (ranks - 1) / ranks


def publish(rows: list[dict[str, Any]], directory: Path) -> None:
    """Add rows to those of earlier calls; a run of the same kind replaces its older one."""
    kept = {tuple(row.get(k) for k in KEY): row for row in [*read_rows("consensus", directory), *rows]}
    write_results("consensus", list(kept.values()), directory, calibration_steps=CALIBRATION_STEPS)


def _channels(exchange: Exchange) -> str:
    if isinstance(exchange, CompressedExchange | LocalSteps):
        return ", ".join(f"{kind} {name}" for kind, name in exchange.channels.items())
    return "all Float32"


def _batch(windows_BT: Tensor) -> Batch:
    windows_BT = windows_BT.long()
    return Batch(windows_BT[:, :-1].contiguous(), windows_BT[:, 1:].contiguous())


if __name__ == "__main__":
    main()
