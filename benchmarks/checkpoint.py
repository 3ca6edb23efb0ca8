"""Checkpoints while training: what they stall, slow down and take, Pylon's beside torch's, in one run.

    python benchmarks/checkpoint.py [--engine slab] [--sizes 1.5 4] [--store URI] [--checkpoints 3] [--minutes 6]

Every engine saves the same state (weights and two moments in float32) of the same model, between the same steps, to the
same store, after one save that is not counted: it allocates and page-locks memory, starts processes and finds the
store's free blocks. Beside them stand limits measured in the same run: the copy of one large buffer from the device to
page-locked memory, and raw parallel writes of as many bytes to the store. Of every save a few tensors are read back and
compared with what they were when it began. checkpoint_row.py says what each column is. An engine that fails costs only
itself: it is named, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from checkpoint_engines import DistributedCheckpoint, TorchSave
from checkpoint_limits import GIB, HostMemory, copy_bytes_per_s, local_path, remove, store_bytes_per_s
from checkpoint_loop import Engine, State, Training, save_among_steps
from checkpoint_row import Case, goals, row_of
from checkpoint_slab import SlabCheckpoint
from gate_step import Shape
from measure import RESULTS, print_table, read_rows, write_results
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

ENGINES: dict[str, Callable[[State, str], Engine]] = {
    "slab": SlabCheckpoint,
    "dcp-thread": partial(DistributedCheckpoint, kind=AsyncCheckpointerType.THREAD),
    "torch.save": TorchSave,
    "dcp-process": partial(DistributedCheckpoint, kind=AsyncCheckpointerType.PROCESS),
}

SHAPES = {
    "cpu": {"0.05": Shape({"layers": 4, "hidden_size": 256, "heads": 4}, 4096, sequences=2, tokens=128)},
    "cuda": {
        "1.5": Shape(
            {"layers": 30, "hidden_size": 576, "heads": 9, "kv_heads": 3, "intermediate_size": 1536},
            49152,
            sequences=32,
            tokens=2048,
        ),
        "4": Shape(
            {"layers": 24, "hidden_size": 1024, "heads": 16, "intermediate_size": 2816},
            49152,
            sequences=24,
            tokens=2048,
        ),
        "14": Shape(
            {"layers": 20, "hidden_size": 2048, "heads": 16, "intermediate_size": 5632},
            49152,
            sequences=16,
            tokens=2048,
        ),
    },
}
"""Models by the GiB of their state."""

COLUMNS = ["engine", "state_gib", "step_ms", "stall_ms", "slowdown", "upload_slowdown", "bytes_per_s", "store_fraction"]
COLUMNS += ["copy_ms", "d2h_fraction", "host_gib", "matches"]
"""Of the printed table."""


def measure(training: Training, case: Case, uri: str, engine_name: str, checkpoints: int) -> dict[str, Any]:
    """One row. Raises what the engine fails of; nothing of it is left in the store."""
    gc.collect()
    memory = HostMemory()
    engine = ENGINES[engine_name](training.state, uri)
    try:
        with memory.watched():
            save_among_steps(training, engine, 0)
        timelines, matches = [], True
        for number in range(1, checkpoints + 1):
            engine.remove(number - 1)
            timeline, samples = save_among_steps(training, engine, number)
            timelines.append(timeline)
            matches &= all(torch.equal(engine.read(number, *key), value.cpu()) for key, value in samples.items())
        memory.sample()
    finally:
        engine.close()
        remove(uri)
    return row_of(case, engine_name, timelines, memory.growth_bytes, matches)


def rows_of(
    training: Training, store: str, engines: Sequence[str], checkpoints: int, deadline_s: float, failures: list[str]
) -> Iterator[dict[str, Any]]:
    """A row of each engine that came through; the others are named in `failures`, or left out for want of time."""
    what = f"{training.state_bytes / GIB:.3g} GiB to {store}"
    uri = f"{store.rstrip('/')}/pylon-benchmark-{os.getpid()}"
    path = local_path(store)
    if path is not None and shutil.disk_usage(path).free < 1.2 * training.state_bytes:
        print(f"{what}: left out, only {shutil.disk_usage(path).free / GIB:.3g} GiB are free there", flush=True)
        return
    begin = time.perf_counter()
    try:
        limits = store_bytes_per_s(uri, training.state_bytes), copy_bytes_per_s(training.device, training.state_bytes)
    except Exception:  # a store that is not there must not cost the others
        failures.append(f"the limits of {what}")
        print(f"{what}: cannot be measured:\n{traceback.format_exc()}", flush=True)
        return
    case = Case(store, training.state_bytes, *limits)
    told = f"limits {limits[0] / 1e9:.3g} GB/s to the store, {limits[1] / 1e9:.3g} GB/s to the host"
    print(f"{what}: {told}, measured in {time.perf_counter() - begin:.0f} s", flush=True)
    seconds = 2 * (checkpoints + 1) * training.state_bytes / case.store_bytes_per_s
    for name in engines:
        begin = time.perf_counter()
        if begin + seconds > deadline_s:
            print(f"  {name}: left out, about {seconds:.0f} s are more than --minutes leaves", flush=True)
            continue
        try:
            row = measure(training, case, f"{uri}/{name}", name, checkpoints)
            if not row["matches"]:
                failures.append(f"{name}, {what}: what it saved is not what the state was")
            yield row
        except Exception:  # whatever one engine dies of must not cost the device time of the others
            failures.append(f"{name}, {what}")
            print(f"  {name} failed:\n{traceback.format_exc()}", flush=True)
        seconds = time.perf_counter() - begin
        print(f"  {name}: {seconds:.0f} s", flush=True)
    remove(uri)


def default_stores() -> list[str]:
    """Memory, which hides no cost of an engine; the disk; and S3 where an endpoint is named."""
    directories = [store for store in ("/dev/shm", tempfile.gettempdir()) if Path(store).is_dir()]
    return directories + (["s3://pylon-benchmark"] if "AWS_ENDPOINT_URL" in os.environ else [])


def main() -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = SHAPES[device.type]
    parser = argparse.ArgumentParser(description="Measure checkpoints while training.")
    parser.add_argument("--engine", choices=list(ENGINES), action="append", help="default: all")
    parser.add_argument("--sizes", choices=list(shapes), nargs="+", default=list(shapes), help="GiB of state")
    parser.add_argument("--store", action="append", help="directory or URI; default: memory, disk, S3 where configured")
    parser.add_argument("--checkpoints", type=int, default=3, help="that count, of each engine (default 3)")
    parser.add_argument("--minutes", type=float, default=6, help="leave out what would take longer (default 6)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory for the JSON file")
    arguments = parser.parse_args()
    deadline_s = time.perf_counter() + 60 * arguments.minutes
    kept = read_rows("checkpoint", arguments.results)
    failures: list[str] = []
    for size in arguments.sizes:
        training = Training(shapes[size], device)
        training.warm_up()
        for store in arguments.store or default_stores():
            engines = arguments.engine or list(ENGINES)
            rows = list(rows_of(training, store, engines, arguments.checkpoints, deadline_s, failures))
            if not rows:
                continue
            print_table([{column: row[column] for column in COLUMNS} for row in rows])
            for row in rows:
                if row["engine"] == "slab":
                    print("  " + ", ".join(goals(row)), flush=True)
            kept = [row for row in kept if _key(row) not in set(map(_key, rows))] + rows
            write_results("checkpoint", kept, arguments.results, timing="ends of steps on the device, none waited for")
        del training
        torch._dynamo.reset()
        gc.collect()  # the next size's memory must not include this one's
    if failures:
        print(f"failed: {'; '.join(failures)}", file=sys.stderr)
    return 1 if failures else 0


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    """A later run replaces what has the same."""
    return row["engine"], row["store"], round(row["state_gib"], 2), row["device"]


if __name__ == "__main__":
    sys.exit(main())
