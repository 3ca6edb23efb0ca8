"""The environment variables of the trainer's container, read in one place."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pylon_api import names
from pylon_trainer.errors import ConfigError

_DEFAULT_GRACE_SECONDS = 30
"""As Kubernetes has it when a pod says nothing."""

_DEFAULT_COLLECTIVE_TIMEOUT_SECONDS = 1800
"""It must outlast reading a checkpoint back, and an evaluation: some ranks wait there for others."""


@dataclass(frozen=True, slots=True)
class Environment:
    """What the pod tells its processes beside the configuration."""

    config_path: Path
    token_file: Path
    status_host: str
    """Address of the status server; empty listens on every one."""
    status_port: int
    scratch: Path
    """Directory of the pod's own that need not survive it."""
    termination_log: Path
    grace_seconds: int
    """Seconds between SIGTERM and SIGKILL."""
    topology_file: Path
    collective_timeout_seconds: int
    """Longest wait for a peer that lives but says nothing: one that is frozen. A dead one is noticed at once."""

    @classmethod
    def read(cls) -> Environment:
        """ConfigError when a number is none."""
        return cls(
            config_path=_path(names.ENV_CONFIG, names.CONFIG_PATH),
            token_file=_path(names.ENV_TOKEN_FILE, f"{names.TOKEN_DIRECTORY}/{names.TOKEN_FILE}"),
            status_host=os.environ.get(names.ENV_STATUS_HOST, ""),
            status_port=integer(names.ENV_STATUS_PORT, names.PORT_STATUS),
            scratch=_path(names.ENV_SCRATCH, names.SCRATCH_DIRECTORY),
            termination_log=_path(names.ENV_TERMINATION_LOG, names.TERMINATION_MESSAGE_PATH),
            grace_seconds=integer(names.ENV_GRACE_SECONDS, _DEFAULT_GRACE_SECONDS),
            topology_file=_path(names.ENV_TOPOLOGY_FILE, f"{names.TOPOLOGY_DIRECTORY}/{names.TOPOLOGY_FILE}"),
            collective_timeout_seconds=integer(
                names.ENV_COLLECTIVE_TIMEOUT_SECONDS, _DEFAULT_COLLECTIVE_TIMEOUT_SECONDS
            ),
        )

    def worker_report(self, rank: int) -> Path:
        """Where a worker leaves word of its end for its launcher."""
        return self.scratch / f"end-of-rank-{rank}.json"


def integer(name: str, default: int | None = None) -> int:
    """An integer of the environment. ConfigError naming the variable."""
    text = os.environ.get(name, "" if default is None else str(default))
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(f"{name} must be an integer (is {text!r})") from error


def _path(name: str, default: str) -> Path:
    return Path(os.environ.get(name) or default)
