"""Server processes in a directory of their own, all gone when their owner is, however it ends.

It knows nothing of Kubernetes; which servers, and when they are ready, is said by `control_plane.py`.
"""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from programs import Programs

READY_SECONDS = 60.0
POLL_SECONDS = 0.1
LOG_LINES = 5

# A child process whose standard input ends however its parent dies; then it kills the process groups that it
# read there and removes the directory.
GUARD = """
while read -r group; do groups="$groups $group"; done
for group in $groups; do kill -9 "-$group"; done 2>/dev/null
rm -rf "$0"
"""


class StartError(RuntimeError):
    """A server left or was not ready in time; the message ends with the servers' last lines."""


class Servers:
    """Starts programs by name; as a context it stops them and removes their directory at its end."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        self.directory = Path(tempfile.mkdtemp(prefix="pylon-control-plane-"))
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", GUARD, str(self.directory)],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._guard.communicate()  # closes its input and waits for its end
        for process in self._processes.values():
            process.wait()

    def start(self, name: str, *flags: str) -> None:
        with self._log(name).open("wb") as log:
            process = subprocess.Popen(
                [*self._programs[name], *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                start_new_session=True,  # Ctrl-C is for the owner; the guard ends the servers
            )
        self._processes[name] = process
        assert self._guard.stdin is not None
        self._guard.stdin.write(f"{process.pid}\n")
        self._guard.stdin.flush()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Raises `StartError` when a server leaves before, or after `READY_SECONDS`."""
        deadline = time.monotonic() + READY_SECONDS
        while not condition():
            for name, process in self._processes.items():
                if process.poll() is not None:
                    raise StartError(f"{name} left with code {process.returncode}:\n{self._last_lines(name)}")
            if time.monotonic() > deadline:
                last = "\n".join(f"{name}:\n{self._last_lines(name)}" for name in self._processes)
                raise StartError(f"not ready after {READY_SECONDS:.0f} s\n{last}")
            time.sleep(POLL_SECONDS)

    def _log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def _last_lines(self, name: str) -> str:
        return "\n".join(self._log(name).read_text(errors="replace").splitlines()[-LOG_LINES:])


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
