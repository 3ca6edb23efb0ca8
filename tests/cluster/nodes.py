"""Emulated nodes: they are in the API like any other, and their pods run as processes of this machine.

It stands in for kubelets where there is no container runtime. It registers nodes with the capacity and labels
that a test asks for, keeps their leases fresh, and runs every pod that the scheduler binds to them through a
`PodRunner`. It also breaks things on request: a node that dies, a node cut off, a process that is killed.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import aiohttp
import kubelet_objects as objects
from api import MERGE_PATCH, Api, ApiError, Background, Object
from pod_life import Hosts, PodLife, PodRunner

HEARTBEAT_SECONDS = 2.0
RECONNECT_SECONDS = 0.2
BOUND = {"fieldSelector": "spec.nodeName!="}
LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"


@dataclass(frozen=True)
class RunningPod:
    namespace: str
    name: str
    uid: str
    node: str
    address: str
    pid: int


class Nodes:
    """All methods may be called from a test's own thread; the work is done on a loop in the background."""

    def __init__(self, kubeconfig: Path, runner: PodRunner) -> None:
        self._api = Api(kubeconfig)
        self._runner = runner
        self._hosts = Hosts(seed=os.getpid())
        self._background = Background()
        self._alive: dict[str, bool] = {}  # every node that we registered -> it still sends heartbeats
        self._lives: dict[str, PodLife] = {}  # pod uid -> its life, ended ones too: no pod runs twice
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._failures: list[Exception] = []

    def __enter__(self) -> Self:
        self._background.call(self._open())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._background.call(self._close())
        finally:
            self._background.close()
        if self._failures:
            failure = ExceptionGroup("the emulated nodes failed", self._failures)
            if error is None:
                raise failure
            error.add_note(f"Before that, {failure}: {self._failures}")

    def add(
        self,
        *names: str,
        gpus: int = 8,
        gpu_resource: str = "nvidia.com/gpu",
        cpus: int = 64,
        memory: str = "512Gi",
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """Registers nodes; topology labels and the like are the caller's choice."""
        for name in names:
            made = objects.node(
                name, gpus=gpus, gpu_resource=gpu_resource, cpus=cpus, memory=memory, labels=labels or {}
            )
            self._background.call(self._register(made))

    def lose(self, node: str, processes: Literal["killed", "running"] = "killed") -> None:
        """The node falls silent for good, its pods' objects stay.

        Their processes die with it, as in a power cut, or go on, as behind a broken network.
        """
        self._background.call(self._lose(node, processes))

    def kill_pod(self, namespace: str, name: str) -> None:
        """SIGKILL to the pod's process; the pod then fails with exit code 137."""
        os.kill(self._running(namespace, name).pid, 9)

    def pods(self) -> list[RunningPod]:
        """The pods whose processes run now, those on lost nodes too."""
        return [
            RunningPod(
                life.namespace,
                life.name,
                life.uid,
                life.pod["spec"]["nodeName"],
                life.address,
                life.process.pid,
            )
            for life in list(self._lives.values())
            if life.process is not None and not life.has_ended
        ]

    def live_pods(self, namespace: str) -> list[str]:
        """Names of those in one namespace, in order."""
        return sorted(pod.name for pod in self.pods() if pod.namespace == namespace)

    def logs(self, namespace: str, name: str) -> str:
        """What the newest pod of this name has printed so far; it may have ended, but must have started."""
        for life in reversed(list(self._lives.values())):
            if (life.namespace, life.name) == (namespace, name) and life.process is not None:
                return life.process.logs()
        raise LookupError(f"pod {namespace}/{name} was never started on an emulated node")

    def _running(self, namespace: str, name: str) -> RunningPod:
        for pod in self.pods():
            if (pod.namespace, pod.name) == (namespace, name):
                return pod
        raise LookupError(f"no process of pod {namespace}/{name}; there are {[pod.name for pod in self.pods()]}")

    async def _open(self) -> None:
        await self._api.__aenter__()
        self._spawn("watch", self._watch())
        self._spawn("heartbeats", self._send_heartbeats())

    async def _close(self) -> None:
        for name in ("watch", "heartbeats"):
            self._tasks.pop(name).cancel()
        for node in self._alive:
            await self._lose(node, "killed")
        if self._tasks:
            await asyncio.wait(self._tasks.values())
        for life in self._lives.values():
            await life.discard()
        nodes = [path for node in self._alive for path in (f"/api/v1/nodes/{node}", f"{LEASES}/{node}")]
        for path in nodes:
            await self._delete(path)
        await self._api.__aexit__(None, None, None)

    async def _delete(self, path: str) -> None:
        try:
            await self._api.request("DELETE", path, {"gracePeriodSeconds": 0})
        except ApiError as error:
            if error.status != 404:
                raise

    async def _register(self, node: Object) -> None:
        name = node["metadata"]["name"]
        self._alive[name] = True
        await self._api.request("POST", LEASES, objects.lease(name))
        await self._api.request("POST", "/api/v1/nodes", node)

    async def _lose(self, node: str, processes: Literal["killed", "running"]) -> None:
        self._alive[node] = False
        for life in self._lives.values():
            if life.pod["spec"]["nodeName"] == node:
                life.lose_node(kill=processes == "killed")

    async def _send_heartbeats(self) -> None:
        while True:
            for name in [name for name, alive in self._alive.items() if alive]:
                with suppress(aiohttp.ClientError):  # as a kubelet, try again at the next beat
                    await self._api.request("PATCH", f"{LEASES}/{name}", objects.heartbeat(), MERGE_PATCH)
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def _watch(self) -> None:
        """Follows every pod that is bound to a node; lists anew when the server has lost our place."""
        version = ""
        while True:
            try:
                if not version:
                    version = await self._list()
                async for kind, pod in self._api.watch("/api/v1/pods", version, BOUND):
                    version = pod["metadata"]["resourceVersion"]
                    if kind != "BOOKMARK":
                        self._take(kind, pod)
            except ApiError as error:
                if error.status != 410:
                    raise
                version = ""
            except aiohttp.ClientError:
                await asyncio.sleep(RECONNECT_SECONDS)

    async def _list(self) -> str:
        pods, version = await self._api.list("/api/v1/pods", BOUND)
        for uid in self._tasks.keys() & self._lives.keys() - {pod["metadata"]["uid"] for pod in pods}:
            self._lives[uid].vanish()
        for pod in pods:
            self._take("MODIFIED", pod)
        return version

    def _take(self, kind: str, pod: Object) -> None:
        uid, node = pod["metadata"]["uid"], pod["spec"]["nodeName"]
        if not self._alive.get(node):
            return
        life = self._lives.get(uid)
        if life is not None:
            life.vanish() if kind == "DELETED" else life.observe(pod)
        elif kind != "DELETED" and pod["status"].get("phase") == "Pending":
            self._lives[uid] = PodLife(self._api, self._runner, self._hosts, pod)
            self._spawn(uid, self._lives[uid].run())

    def _spawn(self, key: str, work: Coroutine[Any, Any, None]) -> None:
        task = self._tasks[key] = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(lambda done: self._forget(key, done))

    def _forget(self, key: str, task: asyncio.Task[None]) -> None:
        self._tasks.pop(key, None)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._failures.append(error)
