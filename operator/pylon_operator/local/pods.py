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
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pylon_api import names
from pylon_operator.local import reaper
from pylon_operator.local.volumes import Object, PodError, fill_volume, find_object, read_field, write_downward

TERMINATION_MESSAGE_BYTES = 4096
LOG_TAIL_BYTES = 65536
LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
NOT_INHERITED = re.compile(r"PYLON_|PET_|KUBERNETES_|MASTER_|(LOCAL_)?(RANK|WORLD_SIZE)$|CUDA_VISIBLE_DEVICES$")
"""Environment of the runner that would be mistaken for the pod's own."""
_REFERENCE = re.compile(r"\$(?:\$|\(([A-Za-z_][-A-Za-z0-9_.]*)\))")


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


def trainer_container(pod: Object) -> Object:
    """The container that trains, or the first of a pod that is not ours."""
    containers: list[Object] = pod["spec"]["containers"]
    return next((each for each in containers if each["name"] == names.CONTAINER), containers[0])


def mount_paths(container: Object, volumes: Mapping[str, Path]) -> dict[str, Path]:
    """Where each mount path of the container lies on this machine."""
    return {
        mount["mountPath"].rstrip("/"): volumes[mount["name"]] / mount.get("subPath", "")
        for mount in container.get("volumeMounts", [])
    }


def container_command(name: str, container: Object, environment: Mapping[str, str]) -> list[str]:
    """The container's command line, with this Python in place of the image's."""
    parts = [*container.get("command", []), *container.get("args", [])]
    if not container.get("command"):
        raise PodError(
            f"pod {name}: container {container['name']!r} has no command, and there is no image to give it one"
        )
    command = [expand(part, environment) for part in parts]
    return [sys.executable, *command[1:]] if command[0] in ("python", "python3") else command


def container_environment(
    container: Object,
    pod: Object,
    config_maps: Mapping[str, Object],
    secrets: Mapping[str, Object],
    address: str,
) -> dict[str, str]:
    """The container's env and envFrom with every reference resolved, in Kubernetes' order of precedence."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        if reference := source.get("configMapRef"):
            entries = find_object(config_maps, "ConfigMap", reference)
        else:
            entries = find_object(secrets, "Secret", source["secretRef"])
        found |= {source.get("prefix", "") + key: value.decode() for key, value in (entries or {}).items()}
    for variable in container.get("env", []):
        name, source = variable["name"], variable.get("valueFrom")
        if source is None:
            found[name] = expand(variable.get("value", ""), found)
        elif "fieldRef" in source:
            found[name] = read_field(pod, source["fieldRef"]["fieldPath"], address)
        elif reference := source.get("configMapKeyRef") or source.get("secretKeyRef"):
            kind, objects = ("ConfigMap", config_maps) if "configMapKeyRef" in source else ("Secret", secrets)
            entries = find_object(objects, kind, reference) or {}
            if reference["key"] in entries:
                found[name] = entries[reference["key"]].decode()
            elif not reference.get("optional"):
                raise PodError(f"env {name}: {kind} {reference['name']!r} has no key {reference['key']!r}")
        else:
            raise PodError(f"env {name}: {next(iter(source))} is not supported locally")
    return found


def expand(text: str, environment: Mapping[str, str]) -> str:
    """`$(NAME)` by its value, as Kubernetes does; unknown names stay, `$$` is a dollar."""
    return _REFERENCE.sub(lambda found: environment.get(found[1], found[0]) if found[1] else "$", text)


def localize(text: str, paths: Mapping[str, Path], hosts: Mapping[str, str]) -> str:
    """A value or argument with the mount path that it begins with, or the DNS names in it, replaced; longest first."""
    for path in _longest_first(paths):
        if text == path or text.startswith(f"{path}/"):
            return f"{paths[path]}{text[len(path) :]}"
    for host in _longest_first(hosts):
        text = re.sub(rf"(?<![-.\w]){re.escape(host)}(?![-.\w])", hosts[host], text)
    return text


def map_port(name: str, value: str, ports: Mapping[int, int]) -> str:
    """A port number by the one to use instead, in variables that are named as a port."""
    return str(ports.get(int(value), value)) if name.endswith("PORT") and value.isdigit() else value


def _longest_first(keys: Iterable[str]) -> list[str]:
    return sorted(keys, key=len, reverse=True)
