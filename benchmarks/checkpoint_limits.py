"""What a checkpoint cannot beat on this machine, limits of copy and store, and what host memory it takes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import fsspec
import torch
from measure import Mark

GIB = 2**30
BLOCK_BYTES = 32 * 2**20
WRITERS = (1, 4, 16)
OBJECT_WRITERS = (2, 8)
"""On other stores than file systems; each is a process."""


def copy_bytes_per_s(device: torch.device, size_bytes: int) -> float:
    """The fastest of several copies of one large buffer to page-locked memory; on a CPU, of one into another."""
    size_bytes = min(size_bytes, GIB)
    source = torch.ones(size_bytes, dtype=torch.uint8, device=device)
    target = torch.ones(size_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def seconds() -> float:
        begin = Mark(device)
        target.copy_(source, non_blocking=True)
        end = Mark(device)
        end.wait()
        return begin.milliseconds_to(end) / 1e3

    return size_bytes / min(seconds() for _ in range(6))


def local_path(uri: str) -> Path | None:
    """The directory behind a URI of this machine's file systems; None for other stores."""
    fs, path = fsspec.core.url_to_fs(uri)
    return Path(path) if "file" in fs.protocol else None


def remove(uri: str) -> None:
    """A directory with all below, where it is there."""
    fs, path = fsspec.core.url_to_fs(uri)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def store_bytes_per_s(uri: str, size_bytes: int) -> float:
    """Raw parallel writes of as many bytes to a store, durable at the end: the best of several ways.

    Ways differ in the number of writers, and on a file system in whether they share one file. They are compared on at
    most 1 GiB; the best is then measured with all bytes. The first of both may have to find memory or blocks first, and
    is done twice.
    """
    directory, path = f"{uri}/limit", local_path(uri)
    source = memoryview(os.urandom(min(size_bytes, BLOCK_BYTES)) * max(1, min(size_bytes, GIB) // BLOCK_BYTES))
    ways: list[Callable[[int], float]]
    if path is None:
        ways = [partial(_put_objects, directory, writers) for writers in OBJECT_WRITERS]
    else:
        ways = [
            partial(_write_files, path / "limit", source, files, writers)
            for writers in WRITERS
            if writers <= max(4, os.cpu_count() or 1)
            for files in {1, writers}
        ]

    def rate(way: Callable[[int], float], total_bytes: int) -> float:
        try:
            return total_bytes / way(total_bytes)
        finally:
            remove(directory)

    few = min(size_bytes, GIB)
    rate(ways[0], few)
    best = max(ways, key=lambda way: rate(way, few))
    return max(rate(best, size_bytes) for _ in range(2))


def _write_files(directory: Path, source: memoryview, files: int, writers: int, total_bytes: int) -> float:
    """Seconds. Each writer has a range of its own, all in one file or each in one file of its own, and flushes it."""
    directory.mkdir(parents=True)
    descriptors = [os.open(directory / str(number), os.O_CREAT | os.O_WRONLY) for number in range(files)]
    share = -(-total_bytes // writers)

    def write(number: int) -> None:
        descriptor = descriptors[number % files]
        base = number * share if files == 1 else 0
        for offset in range(0, share, BLOCK_BYTES):
            start = (number * share + offset) // BLOCK_BYTES * BLOCK_BYTES % len(source)  # what no cache holds
            os.pwrite(descriptor, source[start : start + min(BLOCK_BYTES, share - offset)], base + offset)
        os.fsync(descriptor)

    begin = time.perf_counter()
    try:
        with ThreadPoolExecutor(writers) as pool:
            list(pool.map(write, range(writers)))
        return time.perf_counter() - begin
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _put_objects(directory: str, writers: int, total_bytes: int) -> float:
    """Seconds. Each writer is a process with a client of its own that puts one object."""
    command = [sys.executable, str(Path(__file__).with_name("put_object.py")), str(total_bytes // writers)]
    pipe = subprocess.PIPE
    with ExitStack() as started:
        processes = [
            started.enter_context(subprocess.Popen([*command, f"{directory}/{number}"], stdin=pipe, stdout=pipe))
            for number in range(writers)
        ]
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()  # it is ready, or has ended
        begin = time.perf_counter()
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
        codes = [process.wait() for process in processes]
        seconds = time.perf_counter() - begin
    if any(codes):
        raise OSError(f"raw writers to {directory} ended with {codes}")
    return seconds


class HostMemory:
    """How far the memory of this process and all below it has grown, watched from a thread where that may cost time.

    Proportional set size: a page that several processes map counts once. What a store in memory holds counts not.
    """

    def __init__(self) -> None:
        self._before = _pss_bytes()
        self.growth_bytes = 0

    def sample(self) -> None:
        self.growth_bytes = max(self.growth_bytes, _pss_bytes() - self._before)

    @contextmanager
    def watched(self) -> Iterator[None]:
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.1):
                self.sample()

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()


def _pss_bytes() -> int:
    return sum(_pss_of(pid) for pid in family(os.getpid()))


def family(pid: int) -> set[int]:
    """A process and all below it."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
    family = {pid}
    while children := {child for child, parent in parents.items() if parent in family} - family:
        family |= children
    return family


def _pss_of(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:  # it has ended
        pass
    return 0
