"""A trainer that trains nothing: it counts steps, commits them to a file, answers rank 0's HTTP and obeys signals.

It reads what a real one reads (PYLON_CONFIG, PET_NODE_RANK, PYLON_STATUS_HOST, ...) and this environment:
FAKE_STATE, a directory for its checkpoint; FAKE_STEP_SECONDS; FAKE_COMMIT_EVERY steps (0: only when asked);
FAKE_REFUSAL, a file that, while it is there, makes saves fail with its text;
FAKE_DEATHS, JSON list of {"attempt": 1, "step": 5, "rank": 0, "code": 70}, where attempt 0 means any and a
negative code a signal.
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

CONFIG = json.loads(Path(os.environ["PYLON_CONFIG"]).read_text())
RANK = int(os.environ["PET_NODE_RANK"])
STATE = Path(os.environ["FAKE_STATE"])
STATE.mkdir(parents=True, exist_ok=True)
COMMITTED = STATE / "committed"
REFUSAL = Path(os.environ.get("FAKE_REFUSAL", STATE / "refusal"))
TOTAL = CONFIG["training"]["schedule"]["steps"]
TOKEN = Path(os.environ["PYLON_TOKEN_FILE"]).read_text()


def restored() -> tuple[int, int]:
    """Attempt and step of what was committed last."""
    attempt, step = COMMITTED.read_text().split() if COMMITTED.exists() else (0, 0)
    return int(attempt), int(step)


_, step = restored()
asked = threading.Event()
stopping = threading.Event()
saves: dict[str, Any] = {"committed": 0, "failed": 0, "failedInRow": 0, "failure": ""}


def commit() -> None:
    if REFUSAL.exists():
        row = saves["failedInRow"] + 1
        saves.update(failed=saves["failed"] + 1, failedInRow=row, failure=REFUSAL.read_text())
        return
    saves.update(committed=saves["committed"] + 1, failedInRow=0, failure="")
    fresh = STATE / f".committed-{os.getpid()}"
    fresh.write_text(f"{CONFIG['attempt']} {step}")
    fresh.replace(COMMITTED)


def status(phase: str = "Training") -> dict[str, Any]:
    attempt, saved = restored()
    return {
        "uid": CONFIG["uid"],
        "attempt": CONFIG["attempt"],
        "phase": phase,
        "step": step,
        "totalSteps": TOTAL,
        "tokens": step * 512,
        "loss": 5.0 / (1 + step / 20),
        "heldOutLoss": 5.1 / (1 + step / 20),
        "tokensPerSecond": 12345.0,
        "gate": {"decision": "Gated", "reason": "as set", "ratio": 0.5, "savedFlopsRatio": 0.333},
        "stepSeconds": float(os.environ.get("FAKE_STEP_SECONDS", "0.01")),
        "checkpoint": {"attempt": attempt, "step": saved, "uri": str(COMMITTED), "sizeBytes": 2_000_000}
        if saved
        else None,
        "saves": dict(saves),
        "notices": json.loads(os.environ.get("FAKE_NOTICES", "[]")),
        "sample": "def fake(): pass" if phase == "Finished" else None,
        "exportUri": str(STATE / "export") if phase == "Finished" else None,
    }


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.answer(200, json.dumps(status()).encode())

    def do_POST(self) -> None:
        allowed = self.headers["Authorization"] == f"Bearer {TOKEN}"
        if allowed:
            asked.set()
        self.answer(202 if allowed else 401, b"{}")

    def answer(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def leave(code: int, reason: str, message: str) -> None:
    final = status("Finished") if code == 0 else status()
    words = {"exitCode": code, "reason": reason, "message": message, "final": final if RANK == 0 else None}
    Path(os.environ["PYLON_TERMINATION_LOG"]).write_text(json.dumps(words))
    sys.stdout.flush()
    os._exit(code)


def die_if_told_to() -> None:
    for death in json.loads(os.environ.get("FAKE_DEATHS", "[]")):
        if death["attempt"] in (0, CONFIG["attempt"]) and death.get("rank", 0) == RANK and step >= death["step"]:
            if death["code"] < 0:
                os.kill(os.getpid(), -death["code"])
            leave(death["code"], death.get("reason", "Internal"), death.get("message", "told to die"))


signal.signal(signal.SIGTERM, lambda *_: stopping.set())
if RANK == 0:
    address = (os.environ["PYLON_STATUS_HOST"], int(os.environ["PYLON_STATUS_PORT"]))
    threading.Thread(target=http.server.ThreadingHTTPServer(address, Handler).serve_forever, daemon=True).start()
# The gang meets before anyone moves, so that all begin at the same step.
(STATE / f"present-{CONFIG['attempt']}-{RANK}").touch()
while len(list(STATE.glob(f"present-{CONFIG['attempt']}-*"))) < CONFIG["nodes"]:
    if stopping.is_set():
        leave(75, "Stopped", "asked to stop before the gang had met")
    time.sleep(0.01)
every = int(os.environ.get("FAKE_COMMIT_EVERY", "0"))
print(f"fake trainer: attempt {CONFIG['attempt']} rank {RANK} from step {step}", flush=True)
print(f"after {CONFIG.get('failures', 0)} failures", flush=True)
while step < TOTAL:
    die_if_told_to()
    time.sleep(float(os.environ.get("FAKE_STEP_SECONDS", "0.01")))
    step += 1
    due = asked.is_set() or stopping.is_set() or (every and step % every == 0)
    if RANK == 0 and due:
        asked.clear()
        commit()
    if stopping.is_set():
        leave(75, "Stopped", "asked to stop")
if RANK == 0:
    commit()
leave(0, "Succeeded", "")
