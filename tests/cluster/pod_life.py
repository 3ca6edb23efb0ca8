"""One pod on an emulated node, from its binding until its object is gone, as a kubelet would do it.

The process itself belongs to a `PodRunner`; this writes what happens to it into the pod's status. It runs no
init containers and no probes, and restarts nothing: `restartPolicy` is taken as `Never`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Protocol

import kubelet_objects as objects
from api import STRATEGIC_MERGE_PATCH, Api, ApiError, Object

from pylon_operator.local.pods import PodProcess
from pylon_operator.local.volumes import PodError

MOUNT_RETRY_SECONDS = 0.5
SIGKILLED = 137
START_ERROR = 128  # what a kubelet reports when the container could not be started

Mounts = dict[str, dict[str, Object]]
"""`configmaps` and `secrets`, each by name."""


class PodRunner(Protocol):
    """What nodes need of a runner: `pylon_operator.local.pods.PodRunner`, or one that adds to it."""

    def start(
        self,
        pod: Object,
        *,
        config_maps: Mapping[str, Object],
        secrets: Mapping[str, Object],
        address: str,
        hosts: Mapping[str, str],
    ) -> PodProcess:
        """`address` is the pod's own, `hosts` those of its Job by DNS name. `PodError` and `OSError` fail the pod."""
        ...


class Hosts:
    """Addresses on loopback, one for each name that a pod may be reached by; known before the pod runs."""

    def __init__(self, seed: int) -> None:
        # Emulators that run at the same time should not meet on one address.
        self._base = (127 << 24) + ((1 + seed % 250) << 16) + 1
        self._addresses: dict[tuple[str, str, str], str] = {}

    def address(self, namespace: str, subdomain: str, hostname: str) -> str:
        """Stable for this name, so that a pod that takes another's place is found where the other was."""
        key = (namespace, subdomain, hostname)
        if key not in self._addresses:
            number = self._base + len(self._addresses)
            self._addresses[key] = ".".join(str(number >> shift & 255) for shift in (24, 16, 8, 0))
        return self._addresses[key]


class PodLife:
    def __init__(self, api: Api, runner: PodRunner, hosts: Hosts, pod: Object) -> None:
        self.pod = pod
        self.process: PodProcess | None = None
        self.has_ended = False
        self._api = api
        self._runner = runner
        self._hosts = hosts
        self._node_is_lost = False
        self._must_end = asyncio.Event()
        self._grace_seconds: float | None = None
        metadata = pod["metadata"]
        self.namespace, self.name, self.uid = metadata["namespace"], metadata["name"], metadata["uid"]
        self.path = f"/api/v1/namespaces/{self.namespace}/pods/{self.name}"
        self._subdomain = pod["spec"].get("subdomain", "")
        self.address = hosts.address(self.namespace, self._subdomain, objects.hostname(pod))

    async def run(self) -> None:
        self.observe(self.pod)
        try:
            await self._write(await self._outcome())
            if self._must_end.is_set():
                await self._remove()
        except ApiError as error:
            if error.status not in (404, 409):  # the object is gone, or another one has its name
                raise
        finally:
            self.has_ended = True
            if self.process is not None:
                self.process.kill()

    def observe(self, pod: Object) -> None:
        """Takes in what the API server now says of the pod."""
        old_annotations, self.pod = self.pod["metadata"].get("annotations", {}), pod
        if self.has_ended:
            return
        annotations = pod["metadata"].get("annotations", {})
        if self.process is not None and annotations != old_annotations:
            self.process.update_annotations(annotations)
        if pod["metadata"].get("deletionTimestamp"):
            self._end(pod["metadata"].get("deletionGracePeriodSeconds", 0))

    def vanish(self) -> None:
        """The object is gone: its process may not outlive it."""
        self._end(0.0)

    def lose_node(self, *, kill: bool) -> None:
        """Nothing more is written; without `kill` the process goes on, as behind a broken network."""
        self._node_is_lost = True
        if kill:
            self._end(0.0)

    def _end(self, grace_seconds: float) -> None:
        self._must_end.set()
        if self._grace_seconds is not None and self._grace_seconds <= grace_seconds:
            return
        self._grace_seconds = grace_seconds
        if self.process is None:
            return
        if grace_seconds > 0:
            self.process.terminate(grace_seconds)
        else:
            self.process.kill()

    async def discard(self) -> None:
        """Removes a pod that nobody will report on, as the pod garbage collector does when a node is gone.

        It must be Failed first: a Job that replaces only failed pods would keep its finalizer on it for ever.
        """
        if self.pod["status"].get("phase") in ("Succeeded", "Failed"):
            return
        self._node_is_lost = False
        with suppress(ApiError):
            await self._write({"phase": "Failed", "reason": "NodeLost"})
            await self._remove()

    async def _outcome(self) -> Object:
        """Runs the process to its end and gives the pod's last status."""
        mounts = await self._mounts()
        hosts = await self._dns()
        if mounts is None or self._must_end.is_set():
            why = "the pod was deleted before its container started"
            return objects.finished(self.pod, SIGKILLED, why, "ContainerStatusUnknown")
        try:
            self.process = self._runner.start(
                self.pod,
                config_maps=mounts["configmaps"],
                secrets=mounts["secrets"],
                address=self.address,
                hosts=hosts,
            )
        except (PodError, OSError) as error:
            return objects.finished(self.pod, START_ERROR, str(error), "StartError")
        await self._write(objects.running(self.pod, self.address))
        exit_code = await self.process.wait()
        return objects.finished(self.pod, exit_code, self.process.termination_message())

    async def _mounts(self) -> Mounts | None:
        """All objects that the pod names, once they exist; None when the pod ends before that."""
        while not self._must_end.is_set():
            try:
                return await self._fetch_mounts()
            except ApiError as error:
                if error.status != 404:
                    raise
            try:
                await asyncio.wait_for(self._must_end.wait(), MOUNT_RETRY_SECONDS)
            except TimeoutError:
                continue
        return None

    async def _fetch_mounts(self) -> Mounts:
        found: Mounts = {"configmaps": {}, "secrets": {}}
        for kind, name, optional in objects.mounted_names(self.pod):
            if name in found[kind] or name == "kube-root-ca.crt":
                continue
            try:
                path = f"/api/v1/namespaces/{self.namespace}/{kind}/{name}"
                found[kind][name] = await self._api.request("GET", path)
            except ApiError as error:
                if error.status != 404 or not optional:
                    raise
        return found

    async def _dns(self) -> dict[str, str]:
        """Every name by which pods of the same Job find each other."""
        if not self._subdomain:
            return {}
        hostnames = [objects.hostname(self.pod)]
        metadata = self.pod["metadata"]
        job = metadata.get("labels", {}).get(objects.JOB_NAME_LABEL)
        if job and objects.INDEX_ANNOTATION in metadata.get("annotations", {}):
            answer = await self._api.request("GET", f"/apis/batch/v1/namespaces/{self.namespace}/jobs/{job}")
            hostnames = [f"{job}-{index}" for index in range(answer["spec"]["completions"])]
        return {
            name: self._hosts.address(self.namespace, self._subdomain, hostname)
            for hostname in hostnames
            for name in objects.dns_names(hostname, self._subdomain, self.namespace)
        }

    async def _write(self, status: Object) -> None:
        if self._node_is_lost:
            return
        # The uid makes the server refuse it when another pod has taken the name.
        patch: dict[str, Any] = {"metadata": {"uid": self.uid}, "status": status}
        self.observe(await self._api.request("PATCH", f"{self.path}/status", patch, STRATEGIC_MERGE_PATCH))

    async def _remove(self) -> None:
        if self._node_is_lost:
            return
        await self._api.request("DELETE", self.path, {"gracePeriodSeconds": 0, "preconditions": {"uid": self.uid}})
