"""Runs one Pod as processes of this machine: what a kubelet and a container runtime do, without either.

Used by `pylon run` and by the nodes of the cluster tests. There are no containers, so images, sidecars, init containers
and resource limits are left aside: the trainer's container (or the first) is run with this Python, in the current
directory, with the current environment beneath its own. Nothing is mounted, so every argument and value that begins
with a mount path is rewritten to the volume's directory. There is no pod network: the caller gives each pod an address
and, where pods share one, ports of its own for those that it names.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pylon_api import names
from pylon_operator.local import reaper
from pylon_operator.local.container import (
    container_command,
    container_environment,
    localize,
    map_port,
    mount_paths,
    trainer_container,
)
from pylon_operator.local.volumes import Object, PodError, fill_volume, write_downward

TERMINATION_MESSAGE_BYTES = 4096
LOG_TAIL_BYTES = 65536
LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
NOT_INHERITED = re.compile(r"PYLON_|PET_|KUBERNETES_|MASTER_|(LOCAL_)?(RANK|WORLD_SIZE)$|CUDA_VISIBLE_DEVICES$")
"""Environment of the runner that would be mistaken for the pod's own."""


@dataclass(frozen=True)
class PodRunner:
    """Starts pods. `logs` receives `<pod>.log` and `<pod>.termination` of each."""

    logs: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    """Defaults for every pod, below what the pod itself sets."""
    gpus: Sequence[str] = ()
    """CUDA devices to divide between pods, by what each asks for. A pod that asks for none sees none."""
    gpu_resource_name: str = "nvidia.com/gpu"
    _running: list[PodProcess] = field(default_factory=list, init=False)

    def start(
        self,
        pod: dict[str, Any],
        *,
        config_maps: Mapping[str, Object],
        secrets: Mapping[str, Object],
        address: str,
        hosts: Mapping[str, str],
        ports: Mapping[int, int] | None = None,
    ) -> PodProcess:
        """Starts a pod's process 1.

        `config_maps` and `secrets` are those of the pod's namespace by name. `hosts` maps DNS names to addresses;
        `ports` maps container ports to those to use instead, in variables whose name ends in PORT. Raises PodError
        when the pod needs what is not there.
        """
        name, container = pod["metadata"]["name"], trainer_container(pod)
        self.logs.mkdir(parents=True, exist_ok=True)
        log, message = self.logs / f"{name}.log", self.logs / f"{name}.termination"
        message.write_bytes(b"")
        devices = self._free_gpus(name, container)
        directory = Path(tempfile.mkdtemp(prefix="pylon-"))
        try:
            (directory / "tmp").mkdir()
            volumes = {
                volume["name"]: fill_volume(volume, directory / volume["name"], pod, config_maps, secrets, address)
                for volume in pod["spec"].get("volumes", [])
            }
            paths = mount_paths(container, volumes)
            paths[container.get("terminationMessagePath", names.TERMINATION_MESSAGE_PATH)] = message
            own = container_environment(container, pod, config_maps, secrets, address)
            own = {key: map_port(key, localize(own[key], paths, hosts), ports or {}) for key in own}
            inherited = {key: value for key, value in os.environ.items() if not NOT_INHERITED.match(key)}
            environment = {
                **inherited,
                "GLOO_SOCKET_IFNAME": LOOPBACK,
                "NCCL_SOCKET_IFNAME": LOOPBACK,
                **self.environment,
                **own,
                "CUDA_VISIBLE_DEVICES": ",".join(devices),
                "HOME": str(Path.home()),  # the user's, where stores look for credentials and compilers cache
                "TMPDIR": str(directory / "tmp"),
                names.ENV_TERMINATION_LOG: str(message),
                names.ENV_STATUS_HOST: address,
            }
            command = [localize(part, paths, hosts) for part in container_command(name, container, own)]
            working_directory = container.get("workingDir")
            with log.open("wb") as output:
                process = subprocess.Popen(  # noqa: S603  the user's own command is what should run
                    [sys.executable, "-I", "-S", reaper.__file__, str(directory), *command],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=output,
                    env=environment,
                    cwd=localize(working_directory, paths, hosts) if working_directory else None,
                    bufsize=0,
                    start_new_session=True,
                )
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        running = PodProcess(deepcopy(pod), process, address, volumes, message, log, devices)
        self._running.append(running)
        return running

    def _free_gpus(self, name: str, container: Object) -> tuple[str, ...]:
        """As many devices as the container asks for, none of them in use by another pod."""
        self._running[:] = [pod for pod in self._running if pod.alive]
        asked = int(container.get("resources", {}).get("limits", {}).get(self.gpu_resource_name, 0))
        taken = {device for pod in self._running for device in pod.gpus}
        free = [device for device in self.gpus if device not in taken]
        if self.gpus and asked > len(free):
            raise PodError(f"pod {name}: asks for {asked} GPUs, {len(free)} of {len(self.gpus)} are free")
        return tuple(free[:asked])


@dataclass(eq=False)
class PodProcess:
    """One running pod."""

    pod: dict[str, Any]
    _process: subprocess.Popen[bytes]
    _address: str
    _volumes: Mapping[str, Path]
    _message: Path
    _log: Path
    gpus: tuple[str, ...]
    pid: int = field(init=False)
    """Process 1."""

    def __post_init__(self) -> None:
        assert self._process.stdout is not None
        self.pid = int(self._process.stdout.readline())

    @property
    def alive(self) -> bool:
        """Whether any process of the pod may still run."""
        return self._process.poll() is None

    async def wait(self) -> int:
        """Waits until no process of the pod is left. Returns its exit code, 128 + signal if one ended it."""
        assert self._process.stdout is not None
        if self.alive:
            loop, descriptor = asyncio.get_running_loop(), self._process.stdout.fileno()
            gone = asyncio.Event()
            # The reaper prints nothing after the pid, so its stdout turns readable only when it has gone.
            loop.add_reader(descriptor, gone.set)
            try:
                await gone.wait()
            finally:
                loop.remove_reader(descriptor)
        return self._process.wait()

    def terminate(self, grace_seconds: float) -> None:
        """SIGTERM to process 1, and SIGKILL to the whole pod if it is still there after the grace."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):  # it has gone, or was killed: nothing left to ask
            self._process.stdin.write(f"{grace_seconds}\n".encode())

    def kill(self) -> None:
        """SIGKILL to the whole pod."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def termination_message(self) -> str:
        """The pod's last words; the end of its log if it failed without any and its container asks for that."""
        text = self._message.read_bytes()[-TERMINATION_MESSAGE_BYTES:].decode(errors="replace")
        policy = trainer_container(self.pod).get("terminationMessagePolicy")
        if not text and policy == "FallbackToLogsOnError" and self._process.poll():
            text = self.logs()[-2048:]
        return text

    def logs(self) -> str:
        """The end of what it printed."""
        with self._log.open("rb") as log:
            log.seek(max(self._log.stat().st_size - LOG_TAIL_BYTES, 0))
            return log.read().decode(errors="replace")

    def update_annotations(self, annotations: Mapping[str, str]) -> None:
        """Adds annotations, which reach the pod through its downward-API volumes."""
        metadata = self.pod["metadata"]
        metadata["annotations"] = {**metadata.get("annotations", {}), **annotations}
        for volume in self.pod["spec"].get("volumes", []):
            for source in volume.get("projected", {}).get("sources", [volume]):
                if "downwardAPI" in source and self.alive:
                    write_downward(self._volumes[volume["name"]], source, self.pod, self._address)
