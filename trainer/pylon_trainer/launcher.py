"""Process 1 of a trainer's pod: `python -m pylon_trainer.launcher`.

Refuses a bad configuration within a second, waits for what the pod needs, runs the workers, and ends with the exit code
and termination message of the one that failed first. It never restarts a worker: the operator restarts whole gangs.

It speaks torchrun's variables (PET_*) but is not built on torch's elastic agent: with a static rendezvous and no
restarts little of the agent is left, it hides the workers' codes after a signal, closes them after a fixed 30 s, and
keeps torch loaded in a process that needs none of it.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from pylon_api.names import PORT_RENDEZVOUS, ExitCode
from pylon_api.run import RunConfig, TerminationReport
from pylon_trainer import report
from pylon_trainer.configuration import read_config
from pylon_trainer.errors import ConfigError, PeerLost, TrainerError
from pylon_trainer.runtime.environment import Environment, integer
from pylon_trainer.runtime.processes import Exit, ranks_of, run_workers
from pylon_trainer.runtime.signals import STOPPED_EARLY, StopFlag

TOPOLOGY_WAIT_SECONDS = 60
"""The operator annotates a pod seconds after it was scheduled; without a map, every node is a domain of its own."""

NAME_WAIT_SECONDS = 300
"""A headless Service's record for pod 0 appears when that pod has an address."""

SHUTDOWN_MARGIN_SECONDS = 5
"""What the launcher keeps of the pod's grace to write its message once the workers have ended."""

POLL_SECONDS = 0.5

logger = logging.getLogger("pylon")


def main() -> NoReturn:
    """Run this pod's workers and leave with the exit code that explains the pod."""
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.INFO, stream=sys.stderr)
    environment: Environment | None = None
    try:
        environment = Environment.read()
        end = _launch(environment, read_config(environment.config_path))
    except TrainerError as error:
        end = report.describe(error.exit_code, str(error))
    except Exception as error:
        traceback.print_exc()
        end = report.describe(ExitCode.INTERNAL, f"{type(error).__name__}: {error}")
    _leave(end, environment)


def _launch(environment: Environment, config: RunConfig) -> TerminationReport:
    stop = StopFlag(at_once=lambda why: _leave(report.describe(ExitCode.STOPPED, why), environment))
    node_rank = integer("PET_NODE_RANK")
    if node_rank not in range(config.nodes):
        raise ConfigError(f"PET_NODE_RANK {node_rank} is not among the {config.nodes} nodes")
    _clear_reports(environment, config, node_rank)
    _wait_for_topology(environment, config)
    master = os.environ.get("PET_MASTER_ADDR", "localhost"), integer("PET_MASTER_PORT", PORT_RENDEZVOUS)
    _wait_for_name(master[0])
    stop.defer()
    grace = max(1, environment.grace_seconds - SHUTDOWN_MARGIN_SECONDS)
    exits = run_workers(config, node_rank, master, stop, grace)
    return _explain(environment, exits, is_stopped=stop.is_set())


def _explain(environment: Environment, exits: dict[int, Exit], *, is_stopped: bool) -> TerminationReport:
    """The report of the worker that explains the pod, with the last status when rank 0 is among them."""
    ends = [_worker_end(environment, rank, exit, is_stopped) for rank, exit in exits.items()]
    failed = [end for end in ends if end.report.exit_code != 0]
    cause = report.cause(failed) if failed else report.describe(ExitCode.SUCCEEDED, "")
    final = next((end.report.final for end in ends if end.report.rank == 0), None)
    return cause.model_copy(update={"final": final})


def _worker_end(environment: Environment, rank: int, exit: Exit, is_stopped: bool) -> report.WorkerEnd:
    """What the worker said of its end; else what the kernel said of it."""
    said = report.read(environment.worker_report(rank))
    if said is not None and said.report.exit_code == exit.code:
        return said
    if is_stopped and exit.code == report.CLOSED:
        return report.WorkerEnd(exit.time, report.describe(ExitCode.STOPPED, STOPPED_EARLY, rank=rank))
    message = f"rank {rank} ended with {report.reason(exit.code)} and said nothing"
    return report.WorkerEnd(exit.time, report.describe(exit.code, message, rank=rank))


def _clear_reports(environment: Environment, config: RunConfig, node_rank: int) -> None:
    try:
        environment.scratch.mkdir(parents=True, exist_ok=True)
        for rank in ranks_of(config, node_rank):
            environment.worker_report(rank).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {environment.scratch}: {error.strerror}") from error


def _wait_for_topology(environment: Environment, config: RunConfig) -> None:
    if not config.topology_levels:
        return
    path = environment.topology_file
    if not _wait(lambda: path.is_file() and path.stat().st_size > 0, TOPOLOGY_WAIT_SECONDS):
        logger.warning("no topology in %s after %d s: every node counts alone", path, TOPOLOGY_WAIT_SECONDS)


def _wait_for_name(host: str) -> None:
    def resolves() -> bool:
        try:
            return bool(socket.getaddrinfo(host, None))
        except socket.gaierror:
            return False

    if not _wait(resolves, NAME_WAIT_SECONDS):
        raise PeerLost(f"{host} (pod 0 of the gang) did not resolve within {NAME_WAIT_SECONDS} s")


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _leave(end: TerminationReport, environment: Environment | None) -> NoReturn:
    """Say why, and end at once; the kernel ends workers that are still there with us."""
    if end.exit_code != 0:
        rank = "" if end.rank is None else f" (rank {end.rank})"
        logger.error("%s%s: %s", end.reason, rank, end.message)
    if environment is not None:
        try:
            environment.termination_log.write_bytes(report.fit(end))
        except OSError as error:
            logger.warning("cannot write %s: %s", environment.termination_log, error.strerror)
    sys.stderr.flush()
    os._exit(end.exit_code)


if __name__ == "__main__":
    main()
