"""What the run says of itself: the status board that the loop writes and rank 0's HTTP server reads.

`GET /status` (TrainerStatus), `GET /metrics` (Prometheus), `POST /checkpoint` (bearer token). The loop never waits
for a reader: a status is an immutable object that is replaced as a whole.
"""

from __future__ import annotations

import errno
import hmac
import json
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from pylon_api.names import ENV_STATUS_PORT
from pylon_api.run import CheckpointReport, TrainerPhase, TrainerStatus
from pylon_trainer.errors import ConfigError
from pylon_trainer.metrics import StatusCollector

MAX_NOTICES = 20
_NOT_YET = frozenset({TrainerPhase.STARTING, TrainerPhase.RESTORING})


class Board:
    """The newest status, and the step that the next checkpoint was asked for at."""

    def __init__(self, status: TrainerStatus) -> None:
        self._status = status
        self._lock = threading.Lock()
        self._step_in_progress = 0

    @property
    def status(self) -> TrainerStatus:
        """The newest status; never changes once handed out."""
        return self._status

    def update(self, **changes: Any) -> None:
        """Replace fields of the status."""
        with self._lock:
            self._status = self._status.model_copy(update=changes)

    def add_notice(self, notice: str) -> None:
        """Tell a person something; the oldest of more than MAX_NOTICES go."""
        with self._lock:
            notices = [*self._status.notices, notice][-MAX_NOTICES:]
            self._status = self._status.model_copy(update={"notices": notices})

    def begin_step(self, step: int) -> bool:
        """Enter a step (from 1); whether a checkpoint was asked for at its end."""
        with self._lock:
            self._step_in_progress = step
            asked = self._status.checkpoint_requested_step
            return asked is not None and asked <= step

    def saved(self, checkpoint: CheckpointReport) -> None:
        """Publish a commit, and clear the request that it answers."""
        with self._lock:
            asked = self._status.checkpoint_requested_step
            pending = asked if asked is not None and asked > checkpoint.step else None
            self._status = self._status.model_copy(
                update={"checkpoint": checkpoint, "checkpoint_requested_step": pending}
            )

    def request_checkpoint(self) -> int | None:
        """Ask for a checkpoint; returns the step that it will hold, or None when training has not begun.

        The step in progress has told its peers already whether it ends with a checkpoint, so it is the next one, or the
        last, which is always saved.
        """
        with self._lock:
            if self._status.phase in _NOT_YET:
                return None
            step = min(self._step_in_progress + 1, self._status.total_steps)
            saved = self._status.checkpoint
            if saved is None or saved.step < step:
                asked = self._status.checkpoint_requested_step
                step = step if asked is None else min(asked, step)
                self._status = self._status.model_copy(update={"checkpoint_requested_step": step})
            return step


def serve(
    board: Board, host: str, port: int, *, token_file: Path | None, saves_checkpoints: bool
) -> ThreadingHTTPServer:
    """Answer in a daemon thread until the process ends. ConfigError when the address cannot be had."""
    registry = CollectorRegistry()
    registry.register(StatusCollector(board))

    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # a client that says nothing must not keep a thread

        def do_GET(self) -> None:
            if self.path == "/status":
                self._answer(HTTPStatus.OK, board.status.model_dump_json(by_alias=True, exclude_none=True).encode())
            elif self.path == "/metrics":
                self._answer(HTTPStatus.OK, generate_latest(registry), CONTENT_TYPE_LATEST)
            else:
                self._refuse(HTTPStatus.NOT_FOUND, "there are GET /status, GET /metrics and POST /checkpoint")

        def do_POST(self) -> None:
            if self.path != "/checkpoint":
                self._refuse(HTTPStatus.NOT_FOUND, "there are GET /status, GET /metrics and POST /checkpoint")
            elif not _is_authorized(self.headers.get("Authorization", ""), token_file):
                self._refuse(HTTPStatus.UNAUTHORIZED, "the bearer token of this job is needed")
            elif not saves_checkpoints:
                self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "training.checkpoint is not set, so nothing is saved")
            elif (step := board.request_checkpoint()) is None:
                self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "training has not begun yet")
            else:
                self._answer(HTTPStatus.ACCEPTED, json.dumps({"step": step}).encode())

        def _refuse(self, status: HTTPStatus, error: str) -> None:
            self._answer(status, json.dumps({"error": error}).encode())

        def _answer(self, status: HTTPStatus, body: bytes, content_type: str = "application/json") -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Requests are not logged: the operator asks every few seconds."""

    try:
        server = _Server((host, port), Handler)
    except OSError as error:
        why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be had ({error.strerror})"
        raise ConfigError(
            f"port {port} of {host or 'this machine'} {why}: end what listens there, or set {ENV_STATUS_PORT}"
        ) from error
    threading.Thread(target=server.serve_forever, name="status", daemon=True).start()
    return server


class _Server(ThreadingHTTPServer):
    def server_bind(self) -> None:
        """Bind without HTTPServer's look-up of the host's full name, which waits long where there is no DNS."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = "", self.server_address[1]


def _is_authorized(header: str, token_file: Path | None) -> bool:
    """Reads the token anew each time, because a Secret's file changes under a running pod."""
    if token_file is None:
        return False
    try:
        token = token_file.read_text().strip()
    except OSError:
        return False
    return bool(token) and hmac.compare_digest(header.encode(), f"Bearer {token}".encode())
