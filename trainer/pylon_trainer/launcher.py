"""Process 1 of a trainer's pod: `python -m pylon_trainer.launcher`.

Refuses a bad configuration within a second, waits for what the pod needs, runs the workers under torch's elastic agent
with a static rendezvous, and ends with the exit code and termination message of the worker that failed first.
(Plain torchrun ends with 1 whatever its workers said.) It never restarts a worker: the operator restarts whole gangs.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from pylon_api.names import PORT_RENDEZVOUS, ExitCode
from pylon_api.run import RunConfig, TerminationReport
from pylon_trainer import report
from pylon_trainer.configuration import read_config
from pylon_trainer.errors import ConfigError, PeerLost, TrainerError
from pylon_trainer.runtime.environment import Environment, integer
from pylon_trainer.runtime.signals import STOP_SIGNALS, listen

TOPOLOGY_WAIT_SECONDS = 60
"""The operator annotates a pod seconds after it was scheduled; without a map, every node is a domain of its own."""

NAME_WAIT_SECONDS = 300
"""A headless Service's record for pod 0 appears when that pod has an address."""

RENDEZVOUS_SECONDS = 1800
"""Longest wait for the other pods of the gang: some pull large images first."""

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
    _leave(end, environment)


def _launch(environment: Environment, config: RunConfig) -> TerminationReport:
    node_rank = integer("PET_NODE_RANK")
    ranks = range(node_rank * config.processes_per_node, (node_rank + 1) * config.processes_per_node)
    if node_rank not in range(config.nodes):
        raise ConfigError(f"PET_NODE_RANK {node_rank} is not among the {config.nodes} nodes")
    try:
        environment.scratch.mkdir(parents=True, exist_ok=True)
        for rank in ranks:
            environment.worker_report(rank).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {environment.scratch}: {error.strerror}") from error
    workers = _Workers(environment, config, node_rank)
    listen(STOP_SIGNALS, workers.stop_unless_started)
    _wait_for_topology(environment, config)
    _wait_for_name(os.environ.get("PET_MASTER_ADDR", "localhost"))
    failures = workers.run()
    ends = [_worker_end(environment, rank, failures.get(rank)) for rank in ranks]
    failed = [end for end in ends if end.report.exit_code != 0]
    end = report.cause(failed) if failed else report.describe(ExitCode.SUCCEEDED, "")
    first = report.read(environment.worker_report(0)) if node_rank == 0 else None
    return end.model_copy(update={"final": first.report.final if first else None})


class _Workers:
    """This node's workers, under torch's agent."""

    def __init__(self, environment: Environment, config: RunConfig, node_rank: int) -> None:
        self._environment = environment
        self._config = config
        self._node_rank = node_rank

    def run(self) -> dict[int, tuple[int, float]]:
        """Start them, wait for all; exit code and time of those that failed, by global rank. Also after a signal."""
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we say it in one line
        host, port = os.environ.get("PET_MASTER_ADDR", "localhost"), integer("PET_MASTER_PORT", PORT_RENDEZVOUS)
        launch = LaunchConfig(
            min_nodes=self._config.nodes,
            max_nodes=self._config.nodes,
            nproc_per_node=self._config.processes_per_node,
            run_id=f"{self._config.uid}-{self._config.attempt}",
            rdzv_backend="static",
            rdzv_endpoint=f"{host}:{port}",
            rdzv_configs={"rank": self._node_rank, "timeout": RENDEZVOUS_SECONDS},
            logs_specs=DefaultLogsSpecs(log_dir=str(self._environment.scratch)),
            max_restarts=0,
            monitor_interval=0.1,
            signals_to_handle="SIGTERM,SIGINT",
            shutdown_timeout=max(1, self._environment.grace_seconds - SHUTDOWN_MARGIN_SECONDS),
        )
        try:
            elastic_launch(launch, sys.executable)("-m", "pylon_trainer.worker")
        except ChildFailedError as error:
            first_rank = self._node_rank * self._config.processes_per_node
            return {
                first_rank + failure.local_rank: (_exit_code(failure.exitcode), float(failure.timestamp))
                for failure in error.failures.values()
            }
        except SignalException:
            return {}
        except (RuntimeError, OSError) as error:
            if "EADDRINUSE" in str(error):
                raise ConfigError(f"port {port} (PET_MASTER_PORT) is in use on this machine") from error
            raise PeerLost(f"the gang did not meet: {str(error).splitlines()[0]}") from error
        return {}

    def stop_unless_started(self, number: int) -> None:
        """Leave at once on a signal that comes before the workers, which would catch it, have been started.

        As process 1 nothing else would: the kernel ignores a signal that process 1 has no handler for, and the agent
        installs its own only after the rendezvous.
        """
        if getattr(signal.getsignal(number), "__module__", "").startswith("torch."):
            return
        end = report.describe(ExitCode.STOPPED, "asked to stop before training began")
        _leave(end, self._environment)


def _worker_end(environment: Environment, rank: int, failure: tuple[int, float] | None) -> report.WorkerEnd:
    """What the worker said, or what the kernel said of it: no word and no failure means it was killed for its delay."""
    said = report.read(environment.worker_report(rank))
    if said is not None:
        return said
    exit_code, ended = failure or (128 + signal.SIGKILL, time.time())
    message = f"rank {rank} ended with {report.reason(exit_code)} and said nothing"
    return report.WorkerEnd(ended, report.describe(exit_code, message, rank=rank))


def _exit_code(status: int) -> int:
    """A process's return code as a shell has it: 128 + signal when a signal ended it."""
    return 128 - status if status < 0 else status


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
