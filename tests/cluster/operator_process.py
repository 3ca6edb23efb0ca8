"""The operator as a process of its own, under the ServiceAccount and roles that the chart gives it."""

from __future__ import annotations

import signal
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from servers import free_port
from waiting import wait_for

ROOT = Path(__file__).parents[2]
IMAGE = "pylon-trainer:test"


@dataclass
class OperatorProcess:
    kubeconfig: Path
    namespace: str
    log: Path
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def start(self) -> None:
        """Starts one and waits until it is ready: elected, and its watches are in step."""
        assert self._process is None, "one operator at a time"
        port = free_port()
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "pylon_operator.cli", "operator"),
                    *("--kubeconfig", str(self.kubeconfig), "--lease-namespace", self.namespace),
                    *("--image", IMAGE, "--poll-seconds", "0.5"),
                    *("--health-port", str(port), "--metrics-port", "0"),
                ],
                stdout=output,
                stderr=output,
                cwd=ROOT,
            )
        wait_for(lambda: self._is_ready(port), 60, "the operator is ready")

    def kill(self) -> None:
        """kill -9, in the middle of whatever it does."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(30)
            self._process = None

    def _is_ready(self, port: int) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise AssertionError(f"the operator left with {self._process.returncode}:\n{self.log.read_text()[-4000:]}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False
