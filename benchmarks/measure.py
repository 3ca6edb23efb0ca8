"""What the benchmarks share: timing on the device, the ceiling of its memory, and the file of results."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.utils
from torch import Tensor

RESULTS = Path(__file__).parent / "results"


def milliseconds(function: Callable[[], object], repeat_ms: int = 200) -> float:
    """Median device time of a call, L2 flushed before each, after warm-up and compilation."""
    from triton.testing import do_bench  # not where there is no device

    return float(do_bench(function, warmup=25, rep=repeat_ms, return_mode="median"))


def captured(function: Callable[[], object]) -> Callable[[], None]:
    """Replays what a call has the device do, so that what is timed is the device and not the host that launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and lets libraries choose
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    replay: Callable[[], None] = graph.replay
    return replay


def both_ways_ms(forward: Callable[[], Tensor], *leaves: Tensor) -> tuple[float, float]:
    """Milliseconds of a forward pass without gradients, and of what both ways with gradients for the leaves add."""
    d_y = torch.randn_like(forward())
    with torch.no_grad():
        forward_ms = milliseconds(captured(forward))
    return forward_ms, milliseconds(captured(lambda: torch.autograd.grad(forward(), leaves, d_y))) - forward_ms


def peak_bytes(function: Callable[[], object]) -> int:
    """Device memory that a call needs beyond what is allocated when it starts."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class Mark:
    """A point in the work of a device, or in time on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self._time_s = time.perf_counter()
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Until the device has come here."""
        if self._event is not None:
            self._event.synchronize()

    def milliseconds_to(self, later: Mark) -> float:
        """Time between two marks of one device, once it has passed both."""
        if self._event is not None and later._event is not None:
            return float(self._event.elapsed_time(later._event))
        return (later._time_s - self._time_s) * 1e3


def host_syncs(function: Callable[[], object]) -> int:
    """How often a call made the host wait for the device."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process; it grows when something recompiles."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def copy_bytes_per_s() -> float:
    """Ceiling of the device's memory: bytes read plus bytes written by a copy of 4 GiB."""
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (milliseconds(lambda: target.copy_(source)) / 1e3)


def publish(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    directory: Path,
    timing: str = "median of repeated calls, L2 flushed before each",
) -> None:
    """Print the rows as a table and write them with their environment to `<directory>/<name>.json`."""
    print_table(rows)
    write_results(name, rows, directory, timing=timing)


def device_name() -> str:
    """Of the device that is measured, short: H200, cpu."""
    return torch.cuda.get_device_name().removeprefix("NVIDIA ") if torch.cuda.is_available() else "cpu"


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of equal keys in columns."""
    cells = [list(rows[0])] + [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    print("\n".join(lines), flush=True)


def write_results(name: str, rows: Sequence[Mapping[str, Any]], directory: Path, **notes: Any) -> None:
    """`<directory>/<name>.json`: the environment, with what else there is to note of it, and the rows."""
    on_device = torch.cuda.is_available()
    environment = {
        "device": torch.cuda.get_device_name() if on_device else f"{torch.get_num_threads()} CPU threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_device else None,
        "triton": importlib.metadata.version("triton") if on_device else None,
        **notes,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.json").write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")


def read_rows(name: str, directory: Path) -> list[dict[str, Any]]:
    """What earlier calls left in `<directory>/<name>.json`."""
    path = directory / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    return rows


def results_directory(description: str) -> Path:
    """The command line: where results go."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory for the JSON file")
    if not torch.cuda.is_available():
        parser.error("no CUDA device here; this benchmark measures device kernels")
    directory: Path = parser.parse_args().results
    return directory
