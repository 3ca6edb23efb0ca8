"""The workers of one pod as processes: start them together, end them together.

Why they ended is for report.py to say. Nothing here needs torch, so the launcher starts in a moment and stays small.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass

from pylon_api.run import RunConfig
from pylon_trainer.runtime.signals import StopFlag

POLL_SECONDS = 0.1

CLOSE_SECONDS = 10
"""What the other workers get once one has failed: they notice by themselves, so who is still there hangs."""


@dataclass(frozen=True, slots=True)
class Exit:
    """How the kernel saw a process end."""

    code: int
    """As a shell has it: 128 + signal when a signal ended it."""
    time: float
    """Seconds since the epoch."""


def ranks_of(config: RunConfig, node_rank: int) -> range:
    """Global ranks of one pod's workers."""
    return range(node_rank * config.processes_per_node, (node_rank + 1) * config.processes_per_node)


def run_workers(
    config: RunConfig, node_rank: int, master: tuple[str, int], stop: StopFlag, grace: float
) -> dict[int, Exit]:
    """Start this pod's workers and wait for all; exits by global rank.

    When one fails or `stop` is set, the rest are asked to stop with SIGTERM, once, and killed when their time is over:
    `grace` seconds after a stop, CLOSE_SECONDS after a failure.
    """
    running = {rank: start_worker(config, rank, master) for rank in ranks_of(config, node_rank)}
    exits: dict[int, Exit] = {}
    deadline: float | None = None
    while running:
        for rank, process in list(running.items()):
            status = process.poll()
            if status is not None:
                exits[rank] = Exit(128 - status if status < 0 else status, time.time())
                del running[rank]
        has_failed = any(exit.code for exit in exits.values())
        if deadline is None and (stop.is_set() or has_failed):
            deadline = time.monotonic() + (grace if stop.is_set() else min(grace, CLOSE_SECONDS))
            for process in running.values():
                process.terminate()
        elif deadline is not None and time.monotonic() > deadline:
            for process in running.values():
                process.kill()
        if running:
            time.sleep(POLL_SECONDS)
    return exits


def start_worker(config: RunConfig, rank: int, master: tuple[str, int]) -> subprocess.Popen[bytes]:
    """Start one worker as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "pylon_trainer.worker"],
        env={**os.environ, **worker_environment(config, rank, master)},
        stdin=subprocess.DEVNULL,
    )


def worker_environment(config: RunConfig, rank: int, master: tuple[str, int]) -> dict[str, str]:
    """The variables that torchrun would give a worker."""
    variables = {
        "RANK": rank,
        "WORLD_SIZE": config.world_size,
        "LOCAL_RANK": rank % config.processes_per_node,
        "LOCAL_WORLD_SIZE": config.processes_per_node,
        "MASTER_ADDR": master[0],
        "MASTER_PORT": master[1],
    }
    return {name: str(value) for name, value in variables.items()}
