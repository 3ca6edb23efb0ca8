"""Resonate's scan, forward and backward: its kernels beside the scan in compiled PyTorch and beside other kernels.

    python benchmarks/scan_kernel.py [--tune]

The others are "simple GLA" of flash-linear-attention, where that package is installed (else null): the same recurrence
with maps of each head's own, which a model whose heads share them must repeat.
`copy_share` is the time in which the device copies as many bytes as the kernels need move, over theirs. --tune tries
what the kernels can be cut into and prints the fastest of each, by chunk length.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, copy_bytes_per_s, milliseconds, publish
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pylon_trainer.kernels.scan import scan
from pylon_trainer.models.resonate.scan import chunked_scan

HEADS, WIDTH, SIZE = 24, 64, 64
SHAPES = [(64, 1024), (8, 8192), (2, 32768)]
"""Sequences and tokens of each."""
TUNED = (8, 8192)
WORKERS = 12


def leaves_of(sequences: int, tokens: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Values, steps, poles, write and read."""
    torch.manual_seed(0)
    rows = torch.randn(sequences, tokens, HEADS * WIDTH + 2 * SIZE, device="cuda", dtype=dtype)
    values, write, read = rows.split([HEADS * WIDTH, SIZE, SIZE], -1)
    steps = 0.1 * torch.rand(sequences, tokens, HEADS, device="cuda")
    poles = -1 - 15 * torch.rand(HEADS, device="cuda")
    leaves = [values.unflatten(2, (HEADS, -1)), steps, poles, write.unsqueeze(2), read.unsqueeze(2)]
    return [leaf.detach().requires_grad_() for leaf in leaves]


def fla_scan() -> Callable[..., tuple[Tensor, Tensor]] | None:
    if importlib.util.find_spec("fla") is None:
        return None
    from fla.ops.simple_gla import chunk_simple_gla

    def run(values: Tensor, steps: Tensor, poles: Tensor, write: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
        weighted = (values * steps.unsqueeze(-1)).to(values.dtype)
        repeated = (x.expand(-1, -1, HEADS, -1).contiguous() for x in (read, write))
        y, state = chunk_simple_gla(*repeated, v=weighted, g=steps * poles, scale=1.0, output_final_state=True)
        return y, state

    return run


def times_ms(run: Callable[..., tuple[Tensor, Tensor]], leaves: list[Tensor]) -> tuple[float, float]:
    """Forward alone, and with backward less forward."""
    y_BTHP, _ = run(*leaves)
    d_y_BTHP = torch.randn_like(y_BTHP)
    with torch.no_grad():
        forward_ms = milliseconds(lambda: run(*leaves))
    both_ms = milliseconds(lambda: torch.autograd.grad(run(*leaves)[0], leaves, d_y_BTHP))
    return forward_ms, both_ms - forward_ms


def measure(sequences: int, tokens: int, copy: float) -> dict[str, Any]:
    torch._dynamo.reset()
    leaves = leaves_of(sequences, tokens)
    row: dict[str, Any] = {"sequences": sequences, "tokens": tokens}
    in_torch = torch.compile(partial(chunked_scan, chunk_tokens=64), dynamic=False)
    for name, run in (("kernels", scan), ("torch", in_torch), ("fla", fla_scan())):
        row[f"{name}_forward_ms"], row[f"{name}_backward_ms"] = times_ms(run, leaves) if run else (None, None)
    values_bytes = leaves[0].numel() * leaves[0].itemsize
    for name, passes in (("forward", 5), ("backward", 11)):  # kernels/scan says so
        row[f"{name}_copy_share"] = passes * values_bytes / copy / (row[f"kernels_{name}_ms"] / 1e3)
    return row


def candidates() -> Iterator[dict[str, Any]]:
    """Ways to cut up the kernels; those of one item are measured side by side."""
    tried = {
        "sweep": itertools.product((2, 3, 4), (4, 8), (32, 64)),
        "outputs": itertools.product((2, 3, 4), (4, 8), (8, 24)),
        "gradients": itertools.product((1, 2, 3), (4, 8), (6, 12, 24)),
        "maps": itertools.product((2, 3, 4), (4, 8), (32, 64)),
    }
    lists = [list(tilings) for tilings in tried.values()]
    for chunk_tokens in (64,):
        for number in range(max(map(len, lists))):
            tilings = {name: tilings[number % len(tilings)] for name, tilings in zip(tried, lists, strict=True)}
            yield {"chunk_tokens": chunk_tokens, "columns": 64} | tilings


def kernel_times_ms(kind: dict[str, Any], sequences: int, tokens: int, repeats: int) -> dict[str, float]:
    """Of each kernel, cut up like this; those that do not fit the device are left out."""
    from triton.errors import TritonError

    from pylon_trainer.kernels.scan import launch

    values, steps, poles, write, read = (leaf.detach() for leaf in leaves_of(sequences, tokens))
    tilings = {name: launch.Tiling(*kind[name]) for name in ("sweep", "outputs", "gradients", "maps")}
    launch.choose_tilings = lambda *_: launch.Tilings(kind["chunk_tokens"], kind["columns"], **tilings)
    decays = steps * poles
    states = values.new_empty(sequences, -(-tokens // kind["chunk_tokens"]), HEADS, SIZE, WIDTH)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for work in (
            lambda: launch.forward(values, steps, decays, write, read, None),
            lambda: launch.backward(values, None, values, steps, decays, write, read, states),
        ):
            try:
                for _ in range(repeats):
                    work()
            except TritonError:
                continue
    torch.cuda.synchronize()
    return {
        event.key.removesuffix("_kernel"): event.device_time_total / event.count / 1e3
        for event in profiler.key_averages()
        if event.key.removesuffix("_kernel") in tilings
    }


def tune() -> None:
    kinds = list(candidates())
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as compiling:
        list(compiling.map(partial(kernel_times_ms, sequences=2, tokens=256, repeats=1), kinds))
    found: dict[tuple[str, int], dict[Any, float]] = {}
    for kind in kinds:
        kernel_times_ms(kind, *TUNED, repeats=2)
        for name, time_ms in kernel_times_ms(kind, *TUNED, repeats=5).items():
            found.setdefault((name, kind["chunk_tokens"]), {})[kind[name]] = time_ms
    for (name, chunk_tokens), entries in sorted(found.items()):
        print(f"{name}, chunks of {chunk_tokens}: (stages, warps, tile) and milliseconds")
        for tiling, time_ms in sorted(entries.items(), key=lambda entry: entry[1])[:8]:
            print(f"  {tiling} {time_ms:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the kernels of Resonate's scan.")
    parser.add_argument("--tune", action="store_true", help="try other tilings instead, and print what they cost")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory for the JSON file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device here; this benchmark measures device kernels")
    if arguments.tune:
        tune()
        return
    copy = copy_bytes_per_s()
    publish("scan_kernel", [measure(*shape, copy) for shape in SHAPES], arguments.results)


if __name__ == "__main__":
    main()
