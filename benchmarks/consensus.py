"""Bytes and loss of every way to exchange gradients, at equal tokens, against the exact sum.

    python benchmarks/gate_quality.py --prepare                        # once: the corpus, minutes on a CPU
    python benchmarks/consensus.py [--ranks 2] [--codecs Dct Auto]     # trains; adds to the results that are there
    python benchmarks/consensus.py --scale small                       # gloo on CPUs, minutes

Every run of a seed starts from the same weights, sees the same tokens in the same steps and has the same schedule, with
a lower peak (--late-rate) for codecs whose sums are gathered over many steps.
`below_bf16_ddp` is how many times fewer bytes a rank moves than a ring all-reduce of its gradients in bfloat16.
`communication_share` is the time of the collectives alone, repeated without anything between them, of a step's.
Projections to more ranks (consensus_projection.json) are arithmetic, not measurements: alpha for each hop of a ring and
beta for each byte, both fitted to collectives of this machine or given.
"""

from __future__ import annotations

import argparse
import socket
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
    ModelSpec,
    Precision,
    ScheduleSpec,
    TrainingSpec,
)
from pylon_trainer.consensus.build import build_exchange
from pylon_trainer.consensus.compressed import CALIBRATION_STEPS, CompressedExchange
from pylon_trainer.gating import build_step
from pylon_trainer.models import build_model
from pylon_trainer.optim.optimizer import Optimizer, named_gradients
from pylon_trainer.optim.schedule import learning_rate_ratio
from pylon_trainer.runtime.distributed import World
from pylon_trainer.step import Batch, TrainingStep

CORPUS = Path(__file__).parents[1] / ".cache" / "python_corpus.npz"
PROJECTED_RANKS = (8, 64, 1024)
REPEATS = 20


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


SCALES = {
    "small": Scale({"layers": 2, "hidden_size": 64, "heads": 4}, 8, 64, 200, 24_000, 3e-3),
    "medium": Scale({"layers": 12, "hidden_size": 640, "heads": 10}, 64, 512, 2000, 1_200_000, 1e-3),
    "large": Scale({"layers": 12, "hidden_size": 896, "heads": 14}, 64, 512, 2000, 2_000_000, 6e-4),
}
"""64 and 123 million parameters beside the small one."""


@dataclass(frozen=True)
class RecordingWorld(World):
    """Notes what collectives of a step are called with, so that they can be repeated alone."""

    calls: list[Callable[[], object]] = field(default_factory=list)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """See World."""
        self.calls.append(partial(World.all_gather, self, torch.zeros_like(tensor)))
        return super().all_gather(tensor)

    def all_to_all(self, tensor: Tensor) -> Tensor:
        """See World."""
        self.calls.append(partial(World.all_to_all, self, torch.zeros_like(tensor)))
        return super().all_to_all(tensor)

    def _reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
        self.calls.append(partial(World._reduce, self, torch.zeros_like(tensor), operation))
        super()._reduce(tensor, operation)


@dataclass(frozen=True)
class Task:
    """What one call of this script does on every rank."""

    scale: Scale
    codecs: list[str]
    seeds: list[int]
    steps: int
    bytes_per_step: int
    learning_rate: float
    late_rate: float
    every_steps: int
    compile: Compile
    corpus: Path
    results: Path


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--scale", choices=SCALES, default="medium" if torch.cuda.is_available() else "small")
    parser.add_argument("--codecs", nargs="+", choices=[*ConsensusCodec], default=[*ConsensusCodec])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, help="optimizer steps of a run")
    parser.add_argument("--bytes-per-step", type=int, help="budget of the codecs that have a size")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument(
        "--late-rate", type=float, default=1 / 3, help="of codecs that sum over steps, as a share of the learning rate"
    )
    parser.add_argument("--every-steps", type=int, default=1, help="of Int8 and Int4")
    compile = Compile.DEFAULT if torch.cuda.is_available() else Compile.OFF
    parser.add_argument("--compile", choices=[*Compile], default=compile)
    parser.add_argument("--alpha-us", type=float, help="latency of a hop for the projection; fitted when left out")
    parser.add_argument("--gigabytes-per-s", type=float, help="bandwidth for the projection; fitted when left out")
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    scale = SCALES[arguments.scale]
    task = Task(
        scale,
        [ConsensusCodec.EXACT, *(codec for codec in arguments.codecs if codec != ConsensusCodec.EXACT)],
        arguments.seeds,
        arguments.steps or scale.steps,
        arguments.bytes_per_step or scale.bytes_per_step,
        arguments.learning_rate or scale.learning_rate,
        arguments.late_rate,
        arguments.every_steps,
        Compile(arguments.compile),
        arguments.corpus,
        arguments.results,
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = arguments.alpha_us, arguments.gigabytes_per_s
    mp.spawn(take_part, (arguments.ranks, port, task, given), nprocs=arguments.ranks)


def take_part(rank: int, ranks: int, port: int, task: Task, link: tuple[float | None, float | None]) -> None:
    """One rank's part in all runs."""
    is_on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if is_on_gpu else torch.device("cpu")
    if is_on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    backend = "cpu:gloo,cuda:nccl" if is_on_gpu else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    world = RecordingWorld(rank, ranks, rank, device)
    laboratory = Laboratory(task, world)
    rows, exact = [], {}
    for seed in task.seeds:
        for codec in task.codecs:
            row = laboratory.run(codec, seed)
            if codec == ConsensusCodec.EXACT:
                exact[seed] = row["loss"]
            row |= {"exact_loss": exact[seed], "above_exact": row["loss"] / exact[seed] - 1, "seed": seed}
            rows.append(row)
            if rank == 0:
                print(row, flush=True)
    alpha_s, beta_s = fit_link(world)
    if rank == 0:
        publish(rows, task.results)
        alpha_s = alpha_s if link[0] is None else link[0] / 1e6
        beta_s = beta_s if link[1] is None else 1 / (link[1] * 1e9)
        project(rows, alpha_s, beta_s, task.results)
    dist.destroy_process_group()


class Laboratory:
    """One model, trained anew for every run."""

    def __init__(self, task: Task, world: RecordingWorld) -> None:
        self._task, self._world, self._device = task, world, world.device
        spec = ModelSpec.model_validate(task.scale.model)
        torch.manual_seed(0)
        self._model = build_model(spec, vocab_size=VOCABULARY).to(world.device)
        self._parameters = dict(self._model.named_parameters())
        self._training_step: TrainingStep = build_step(self._model, self._training("Exact"), world.device)
        corpus = read_corpus(task.corpus)
        self._windows = {split: self._cut(corpus[f"python_{split}"]) for split in ("train", "held_out")}

    def run(self, codec: str, seed: int) -> dict[str, Any]:
        """Train from fresh weights, and say what it took and gave."""
        task, world = self._task, self._world
        training = self._training(codec)
        self._restart(seed)
        optimizer = Optimizer(self._parameters, training.optimizer)
        exchange = build_exchange(world, training, self._parameters)
        peak_rate = task.learning_rate * (task.late_rate if exchange.smoothed else 1)
        step_bytes, step_ms, exchange_ms = [], [], []
        for step, batch in zip(range(task.steps), self._batches(seed), strict=False):
            begin_bytes = world.traffic.bytes
            world.calls.clear()
            is_timed = step >= task.steps - REPEATS
            marks = [Mark(self._device)] if is_timed else []
            tokens = world.size * batch.labels_BT.numel()
            self._training_step.forward_backward(batch, global_tokens=tokens, step=step)
            marks += [Mark(self._device)] if is_timed else []
            exchange.exchange(named_gradients(self._parameters))
            marks += [Mark(self._device)] if is_timed else []
            rate = learning_rate_ratio(training.schedule, step, task.steps)
            optimizer.update(peak_rate * rate, smoothed=exchange.smoothed)
            for parameter in self._parameters.values():
                parameter.grad = None
            step_bytes.append(world.traffic.bytes - begin_bytes)
            if is_timed:
                marks.append(Mark(self._device))
                marks[-1].wait()
                step_ms.append(marks[0].milliseconds_to(marks[3]))
                exchange_ms.append(marks[1].milliseconds_to(marks[2]))
        parameters = sum(parameter.numel() for parameter in self._parameters.values())
        median_bytes = statistics.median(step_bytes)
        ms = statistics.median(step_ms)
        return {
            "codec": str(codec),
            "ranks": world.size,
            "parameters": parameters,
            "bytes_per_step_median": median_bytes,
            "bytes_per_step_peak": max(step_bytes),
            "below_bf16_ddp": 4 * parameters * (world.size - 1) / world.size / median_bytes,
            "loss": self._held_out_loss(),
            "steps": task.steps,
            "tokens": task.steps * task.scale.sequences * task.scale.tokens,
            "learning_rate": peak_rate,
            "step_ms": ms,
            "exchange_share": statistics.median(exchange_ms) / ms,
            "communication_share": self._communication_ms() / ms,
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

    def _training(self, codec: str) -> TrainingSpec:
        task = self._task
        is_sized = codec not in (ConsensusCodec.EXACT, ConsensusCodec.INT8, ConsensusCodec.INT4)
        is_turned = codec in (ConsensusCodec.INT8, ConsensusCodec.INT4)
        return TrainingSpec(
            data=DataSpec(train=["unused"]),
            schedule=ScheduleSpec(steps=task.steps, warmup_steps=task.steps // 20),
            precision=Precision.BFLOAT16 if self._device.type == "cuda" else Precision.FLOAT32,
            compile=task.compile,
            consensus=ConsensusSpec(
                codec=ConsensusCodec(codec),
                bytes_per_step=task.bytes_per_step if is_sized else None,
                every_steps=task.every_steps if is_turned else 1,
            ),
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
        windows_WT = self._windows["held_out"][self._world.rank :: self._world.size]
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
    """What collectives would take on more ranks, by arithmetic: two for each channel, n - 1 hops in each."""
    projected = []
    for row in rows:
        collectives = 2 * len(row["channels"].split(", "))
        for ranks in PROJECTED_RANKS:
            moved_bytes = row["bytes_per_step_median"] * _share(ranks) / _share(row["ranks"])
            seconds = collectives * alpha_s * (ranks - 1) + beta_s * moved_bytes
            projected.append(
                {
                    "projection": True,
                    "codec": row["codec"],
                    "ranks": ranks,
                    "bytes_per_step": int(moved_bytes),
                    "communication_ms": seconds * 1e3,
                    "of_step_now": seconds * 1e3 / row["step_ms"],
                    "alpha_us": alpha_s * 1e6,
                    "gigabytes_per_s": 1e-9 / beta_s,
                    "seed": row["seed"],
                }
            )
    print_table(projected)
    write_results("consensus_projection", projected, directory, note="arithmetic from measured bytes, not measured")


def _share(ranks: int) -> float:
    """Bytes of a rank, in payloads: exchanges between two ranks move one payload, among n 2 (n - 1) / n."""
    return 2 * (ranks - 1) / ranks


def publish(rows: list[dict[str, Any]], directory: Path) -> None:
    """Add rows to those of earlier calls; a run of the same kind replaces its older one."""
    key = ("codec", "ranks", "parameters", "steps", "learning_rate", "seed", "channels")
    kept = {tuple(row[k] for k in key): row for row in [*read_rows("consensus", directory), *rows]}
    print_table([{k: v for k, v in row.items() if k != "channels"} for row in kept.values()])
    write_results("consensus", list(kept.values()), directory, calibration_steps=CALIBRATION_STEPS)


def _channels(exchange: object) -> str:
    if not isinstance(exchange, CompressedExchange):
        return "all Float32"
    return ", ".join(f"{kind} {name}" for kind, name in exchange.channels.items())


def _batch(windows_BT: Tensor) -> Batch:
    windows_BT = windows_BT.long()
    return Batch(windows_BT[:, :-1].contiguous(), windows_BT[:, 1:].contiguous())


if __name__ == "__main__":
    main()
