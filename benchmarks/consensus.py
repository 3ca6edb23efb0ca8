"""Bytes and loss of every way to exchange, at equal tokens, against the exact sum.

    python benchmarks/gate_quality.py --prepare                   # once: the corpus, minutes on a CPU
    python benchmarks/consensus.py [--ranks 2]                    # trains; adds to the results that are there
    python benchmarks/consensus.py --recipes Dct Sign,localSteps=8,optimizer=Muon --seeds 0 1
    python benchmarks/consensus.py --scale small                  # gloo on CPUs, minutes

A recipe is a codec with fields of `training.consensus`, and of these: `rate`, its learning rate as a share of the
others', `beta1` and `beta2`, its optimizer's. With `beta1=0,beta2=0` AdamW moves by the sign of what got through, as
DeMo does. Every run of a seed starts from the same weights, sees the same tokens in the same steps and has the same
schedule, with a lower peak (--late-rate) for codecs whose sums are gathered over many steps. `exact_loss` is the lowest
of the exact runs of the same seed and optimizer, whatever their rates, those of earlier calls included.

Bytes are all that a rank of the trainer moves in a step: gradients or weights, whether they are finite, tokens and
stops, hashes. `counted_by_transport` is their sum over a run as handed to torch.distributed, `counted_bytes` the
trainer's own count. `below_bf16_ddp` is how many times fewer the mean is than a ring all-reduce of gradients in
bfloat16. `communication_fraction` is the time of a step's collectives alone, repeated without anything between them, of
a step's; consensus_projection.py reckons from it what more ranks would take.
"""

from __future__ import annotations

import argparse
import os
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from consensus_link import RecordingWorld
from consensus_recipes import RECIPE, SETTING
from consensus_runs import SCALES, Laboratory, Scale, read_recipe
from measure import RESULTS, print_table, read_rows, write_results

from pylon_api.training import Compile, ConsensusCodec
from pylon_trainer.consensus.compressed import CALIBRATION_STEPS

CORPUS = Path(__file__).parents[1] / ".cache" / "python_corpus.npz"
PAIRED = (*SETTING, "seed")
"""What runs that are compared have in common."""
KEY = (*RECIPE, "channels", "seed")
"""What tells runs apart."""
DEFAULT_RECIPES = (
    "Exact",
    "Sign,localSteps=8",
    "Int4,localSteps=32",
    "Int4,localSteps=16",
    "Int8,localSteps=32",
    "Int8",
    "Int4",
    "Auto",
    "Dct",
    "Dct,beta1=0,beta2=0,rate=0.3",
    "Dct,localSteps=4",
)


@dataclass(frozen=True)
class Task:
    """What one call of this script does on every rank."""

    scale: Scale
    recipes: list[str]
    seeds: list[int]
    compile: Compile
    late_rate: float
    minutes: float | None
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
    parser.add_argument("--held-out", type=int, help="sequences that the loss is told on; all, when left out")
    parser.add_argument("--bytes-per-step", type=int, help="budget of the codecs that have a size")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument(
        "--late-rate", type=float, default=1 / 3, help="of codecs that sum over steps, as a share of the learning rate"
    )
    parser.add_argument("--minutes", type=float, help="begin no run that would end after this long")
    compile = Compile.DEFAULT if torch.cuda.is_available() else Compile.OFF
    parser.add_argument("--compile", choices=[*Compile], default=compile)
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    changes = {
        "steps": given.steps,
        "sequences": given.sequences,
        "held_out": given.held_out,
        "bytes_per_step": given.bytes_per_step,
        "learning_rate": given.learning_rate,
    }
    scale = replace(SCALES[given.scale], **{name: value for name, value in changes.items() if value is not None})
    task = Task(
        scale,
        sorted(given.recipes, key=lambda text: not is_exact(text)),
        given.seeds,
        Compile(given.compile),
        given.late_rate,
        given.minutes,
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
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    backend = "cpu:gloo,cuda:nccl" if is_on_gpu else "gloo"
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # of no use to two GPUs, and not allowed everywhere
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    world = RecordingWorld(rank, ranks, rank, device)
    laboratory = Laboratory(world, task.scale, task.compile, task.late_rate, task.corpus)
    rows: list[dict[str, Any]] = []
    last_s = 0.0
    for seed, text in ((seed, text) for seed in task.seeds for text in task.recipes):
        run_begins_s = time.monotonic()
        is_too_late = task.minutes is not None and run_begins_s - begin_s + last_s > 60 * task.minutes
        if any(world.gather(is_too_late)):
            break
        row = laboratory.run(read_recipe(text), seed)
        last_s = time.monotonic() - run_begins_s
        rows.append(row)
        if rank == 0:
            publish(rows, task.results)
            print(f"{time.monotonic() - begin_s:.0f} s, {text}: {row}", flush=True)
    if rank == 0:
        print_table([{k: v for k, v in row.items() if k != "channels"} for row in rows])
    dist.destroy_process_group()


def publish(rows: list[dict[str, Any]], directory: Path) -> None:
    """Add rows to those of earlier calls; a run of the same kind replaces its older one.

    Each is held against the lowest exact run of its kind and seed.
    """
    kept = {tuple(row[k] for k in KEY): row for row in [*read_rows("consensus", directory), *rows]}
    for row in kept.values():
        exact = [o["loss"] for o in kept.values() if o["is_exact"] and all(o[k] == row[k] for k in PAIRED)]
        row["exact_loss"] = min(exact, default=None)
        row["above_exact"] = row["loss"] / min(exact) - 1 if exact else None
    write_results("consensus", list(kept.values()), directory, calibration_steps=CALIBRATION_STEPS)


if __name__ == "__main__":
    main()
