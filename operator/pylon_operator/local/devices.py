"""What this machine has to train on. Asks the driver, never torch, which would take seconds and memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from pylon_api.job import PylonJobSpec
from pylon_operator.local.state import StateError


def find_gpus(spec: PylonJobSpec) -> tuple[str, ...]:
    """The CUDA devices that we may use. Raises StateError when the job asks for more."""
    asked = spec.nodes * spec.gpus_per_node
    if not asked:
        return ()
    found = visible_gpus()
    if asked > len(found):
        raise StateError(
            f"spec.gpusPerNode: {spec.nodes} x {spec.gpus_per_node} GPUs asked for, {len(found)} found on this "
            "machine; 0 trains on CPU"
        )
    return found


def visible_gpus() -> tuple[str, ...]:
    """CUDA_VISIBLE_DEVICES where it is set, else every device that nvidia-smi lists."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return tuple(device.strip() for device in visible.split(",") if device.strip())
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    listed = subprocess.run(  # noqa: S603
        [program, "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return tuple(listed.stdout.split()) if listed.returncode == 0 else ()


def threads_per_process(processes: int) -> int:
    """Threads for each of `processes` training processes: torch gives every one all cores, and they then fight."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, cores // processes)
