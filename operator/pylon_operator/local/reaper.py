"""Holds one local pod together, as a container runtime would: runs process 1 and lets nothing outlive it.

Started by `pods.py` as a script of its own (`python -I -S reaper.py DIRECTORY COMMAND...`), so it imports the standard
library only, and that sparingly. DIRECTORY is the pod's own and goes when the pod has gone.
It reads orders from stdin: a line with a number sends SIGTERM to process 1 and allows it that many seconds; the end of
stdin, which is also what the runner's own death looks like, kills everything at once. It prints process 1's pid, and
exits with process 1's exit code, or 128 + the signal that ended it.

Killing a process group is not enough: torchrun starts each worker in a session of its own. So on Linux this process
is a "child subreaper" (prctl(2)), which orphans of the pod fall back to. Elsewhere a worker that process 1
abandons before it exits is out of reach.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LOST_COMMAND = 127


def main(directory: str, command: list[str]) -> int:
    """Runs `command` as process 1 until it ends or is ordered to. Returns the exit code of the pod."""
    become_subreaper()
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)

    process_1 = start(command)
    print(process_1, flush=True)
    deadline: float | None = None
    status: int | None = None
    while status is None:
        patience = None if deadline is None else max(deadline - time.monotonic(), 0)
        ready, _, _ = select.select([0, wake_read], [], [], patience)
        if not ready:
            break
        if wake_read in ready:
            os.read(wake_read, 4096)
            status = reap(process_1)
        elif orders := os.read(0, 4096):
            os.kill(process_1, signal.SIGTERM)
            deadline = time.monotonic() + float(orders.split()[-1])
        else:
            break
    status = kill_all(process_1, status)
    shutil.rmtree(directory, ignore_errors=True)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def start(command: list[str]) -> int:
    """Starts process 1 in a session of its own, with its output going to our stderr. Returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        die_with_parent()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.execvp(command[0], command)  # noqa: S606  the user's own command is what should run
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
    os._exit(LOST_COMMAND)


def reap(process_1: int) -> int | None:
    """Collects every child that has ended. Returns process 1's wait status if it was among them."""
    status = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            if ended[0] == process_1:
                status = ended[1]
    return status


def kill_all(process_1: int, status: int | None) -> int:
    """Kills all that is left of the pod and waits for it. Returns process 1's wait status."""
    with contextlib.suppress(ChildProcessError):
        while True:
            for pid in descendants():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            pid, ended = os.waitpid(-1, 0)
            if pid == process_1:
                status = ended
    if status is None:
        raise RuntimeError("process 1 ended without a status")
    return status


def descendants() -> list[int]:
    """pids of all processes below this one."""
    children: dict[int, list[int]] = {}
    for pid, parent in processes():
        children.setdefault(parent, []).append(pid)
    found, left = [], [os.getpid()]
    while left:
        below = children.get(left.pop(), [])
        found += below
        left += below
    return found


def processes() -> list[tuple[int, int]]:
    """(pid, parent's pid) of every process that we may see."""
    if sys.platform != "linux":
        table = subprocess.run(["/bin/ps", "-A", "-o", "pid=,ppid="], capture_output=True, check=True, text=True)
        return [(int(pid), int(parent)) for pid, parent in map(str.split, table.stdout.splitlines())]
    pairs = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name in parentheses may hold spaces and parentheses; state and parent follow the last one.
            pairs.append((int(entry.parent.name), int(entry.read_text().rpartition(")")[2].split()[1])))
    return pairs


def become_subreaper() -> None:
    """Makes orphans of the pod our children. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent() -> None:
    """Asks for SIGKILL when the reaper itself is killed. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
