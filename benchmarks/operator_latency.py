"""How fast the operator turns a PylonJob into a Job, and what it costs: latency, memory, CPU, requests.

    python benchmarks/operator_latency.py                       a control plane of its own (tests/cluster)
    python benchmarks/operator_latency.py --kubeconfig FILE     any cluster; works in a namespace of its own

Pods are kept from being scheduled, so nothing runs but the control plane and the operator, which is started from this
checkout as a process. Latency is from sending the PylonJob to the watch event of its Job, as a client sees it. Memory
and CPU are the operator's, from /proc (Linux).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import secrets
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import yaml

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("crds", "operator", "tests/cluster")]

from control_plane import control_plane  # noqa: E402

from pylon_api import names  # noqa: E402
from pylon_operator.api import APPLY_PATCH, Api  # noqa: E402
from pylon_operator.api_errors import NotFound  # noqa: E402
from pylon_operator.credentials import load_credentials  # noqa: E402
from pylon_operator.kinds import JOBS, PODS, PYLON_JOBS  # noqa: E402

NAMESPACES = "/api/v1/namespaces"
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
QUIET_SECONDS = 60
"""How long idle and settled operators are measured for."""
Row = dict[str, Any]


def a_job(name: str, pods: int) -> dict[str, Any]:
    nowhere = {"nodeSelector": {f"{names.GROUP}/benchmark": "nowhere"}}
    training = {"data": {"train": ["python://stdlib/**/*.py"]}, "schedule": {"steps": 1}}
    spec = {"nodes": pods, "template": {"spec": nowhere}, "training": training}
    return {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": name}, "spec": spec}


@dataclass
class Operator:
    """The operator's process, and what /proc and /metrics say of it."""

    process: subprocess.Popen[bytes]
    metrics_port: int

    def rss_mib(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def peak_rss_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found, "Linux has VmHWM"
        return int(found[1]) / 1024

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def leads(self) -> bool:
        """Whether it has taken the lease; exits when it has left instead."""
        if self.process.poll() is not None:
            sys.exit(f"the operator left with {self.process.returncode}; see its log")
        try:
            return "pylon_leader 1.0" in await self._metrics()
        except aiohttp.ClientError:
            return False

    async def _metrics(self) -> str:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{self.metrics_port}/metrics") as answer,
        ):
            return await answer.text()

    async def requests(self) -> dict[str, int]:
        """Requests to the API server so far, by verb; renewals of the lease are the only PUTs."""
        text = await self._metrics()
        counts: dict[str, int] = {}
        for verb, number in re.findall(r'^pylon_api_requests_total\{code="\w+",verb="(\w+)"\} (\S+)', text, re.M):
            counts[verb] = counts.get(verb, 0) + int(float(number))
        return counts


@contextmanager
def operator(kubeconfig: Path, namespace: str, log: Path) -> Iterator[Operator]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [
        *(sys.executable, "-m", "pylon_operator.commands.operator", "--kubeconfig", str(kubeconfig)),
        *("--namespace", namespace, "--lease-namespace", namespace, "--image", "pylon-trainer:benchmark"),
        *("--metrics-port", str(port), "--health-port", str(port)),
    ]
    folders = os.pathsep.join([str(ROOT / "crds"), str(ROOT / "operator"), os.environ.get("PYTHONPATH", "")])
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | {"PYTHONPATH": folders})
        try:
            yield Operator(process, port)
        finally:
            process.terminate()
            process.wait(30)


@dataclass
class Arrivals:
    """When the Job of each PylonJob, and each pod, was first seen."""

    jobs: dict[str, float] = field(default_factory=dict)
    pods: set[str] = field(default_factory=set)

    async def watch_jobs(self, api: Api, namespace: str, since: str) -> None:
        async for event in _events(api, JOBS.path(namespace), since):
            self.jobs.setdefault(event["metadata"]["labels"][names.LABEL_JOB], time.monotonic())

    async def watch_pods(self, api: Api, namespace: str, since: str) -> None:
        async for event in _events(api, PODS.path(namespace), since):
            self.pods.add(event["metadata"]["name"])


async def _events(api: Api, path: str, since: str) -> AsyncIterator[dict[str, Any]]:
    query = {"watch": "1", "resourceVersion": since, "timeoutSeconds": "3600"}
    async for event in api.stream(path, query=query, silence_seconds=3600):
        if event["type"] in ("ADDED", "MODIFIED"):
            yield event["object"]


@asynccontextmanager
async def a_namespace(api: Api) -> AsyncIterator[str]:
    name = f"pylon-benchmark-{secrets.token_hex(3)}"
    await api.request("POST", NAMESPACES, body={"metadata": {"name": name}})
    try:
        async with asyncio.timeout(60):  # pods need it
            while not await _exists(api, f"{NAMESPACES}/{name}/serviceaccounts/default"):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        yield name
    finally:
        await api.request("DELETE", f"{NAMESPACES}/{name}")


async def _exists(api: Api, path: str) -> bool:
    try:
        await api.request("GET", path)
    except NotFound:
        return False
    return True


async def _until(what: str, condition: Any, seconds: float = 300) -> None:
    try:
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    except TimeoutError:
        sys.exit(f"after {seconds:.0f} s still not: {what}; see the operator's log")


class Measurement:
    """One operator in one namespace, and the rows that it yields."""

    def __init__(self, api: Api, running: Operator, namespace: str, pods: int) -> None:
        self.api, self.operator, self.namespace, self.pods = api, running, namespace, pods
        self.arrivals = Arrivals()
        self.made = 0

    async def quiet(self, case: str) -> Row:
        """Memory and CPU while nothing changes."""
        cpu, requests = self.operator.cpu_seconds(), await self.operator.requests()
        await asyncio.sleep(QUIET_SECONDS)
        used, after = self.operator.cpu_seconds() - cpu, await self.operator.requests()
        return {
            "case": case,
            "jobs": self.made,
            "pods_per_job": self.pods,
            "rss_mib": round(self.operator.rss_mib(), 1),
            "cpu_seconds_per_minute": round(used * 60 / QUIET_SECONDS, 2),
            **{
                f"{verb.lower()}_per_minute": round((after.get(verb, 0) - requests.get(verb, 0)) * 60 / QUIET_SECONDS)
                for verb in ("GET", "POST", "PATCH", "PUT")
            },
        }

    async def _settled(self) -> None:
        """Wait until three seconds pass without a write: the last status and events are out."""
        seen, since = {}, time.monotonic()
        while time.monotonic() - since < 3:
            requests = await self.operator.requests()
            writes = {verb: requests.get(verb, 0) for verb in ("POST", "PATCH")}
            if writes != seen:
                seen, since = writes, time.monotonic()
            await asyncio.sleep(0.2)

    async def jobs(self, case: str, number: int, at_once: int) -> Row:
        """Create `number` jobs, `at_once` at a time, and wait for all their Jobs and pods."""
        cpu, requests = self.operator.cpu_seconds(), await self.operator.requests()
        wanted = [f"{case}-{index}" for index in range(number)]
        sent: dict[str, float] = {}
        slots = asyncio.Semaphore(at_once)
        started = time.monotonic()

        async def create(name: str) -> None:
            async with slots:
                sent[name] = time.monotonic()
                await self.api.request("POST", PYLON_JOBS.path(self.namespace), body=a_job(name, self.pods))
                if at_once == 1:
                    await _until(f"the Job of {name}", lambda: name in self.arrivals.jobs)

        await asyncio.gather(*map(create, wanted))
        await _until("all Jobs", lambda: all(name in self.arrivals.jobs for name in wanted))
        jobs_seconds = time.monotonic() - started
        self.made += number
        await _until("all pods", lambda: len(self.arrivals.pods) >= self.made * self.pods)
        pods_seconds = time.monotonic() - started
        await self._settled()
        used, after = self.operator.cpu_seconds() - cpu, await self.operator.requests()
        per_job = {verb: (after.get(verb, 0) - requests.get(verb, 0)) / number for verb in ("GET", "POST", "PATCH")}
        latencies = sorted((self.arrivals.jobs[name] - sent[name]) * 1000 for name in wanted)
        return {
            "case": case,
            "jobs": number,
            "pods_per_job": self.pods,
            "latency_p50_ms": round(statistics.median(latencies), 1),
            "latency_p99_ms": round(latencies[min(number - 1, int(number * 0.99))], 1),
            "all_jobs_seconds": round(jobs_seconds, 2),
            "all_pods_seconds": round(pods_seconds, 2),
            "writes_per_job": round(per_job["POST"] + per_job["PATCH"], 2),
            "reads_per_job": round(per_job["GET"], 2),
            "cpu_seconds": round(used, 2),
            "peak_rss_mib": round(self.operator.peak_rss_mib(), 1),
        }


async def measure(kubeconfig: Path, sequential: int, burst: int, pods: int) -> tuple[list[Row], str]:
    """All rows, and the API server's version."""
    async with Api(load_credentials(kubeconfig)) as api:
        server = (await api.request("GET", "/version"))["gitVersion"]
        crd = yaml.safe_load(next((ROOT / "crds").glob("*.yaml")).read_text())
        query = {"fieldManager": "pylon-benchmark", "force": "true"}
        path = f"{CRDS}/{crd['metadata']['name']}"
        await api.request("PATCH", path, query=query, body=crd, content_type=APPLY_PATCH)
        async with a_namespace(api) as namespace:
            log = ROOT / "benchmarks" / "operator_latency.log"
            with operator(kubeconfig, namespace, log) as running:
                return await _rows(api, running, namespace, (sequential, burst, pods)), server


async def _rows(api: Api, running: Operator, namespace: str, size: tuple[int, int, int]) -> list[Row]:
    sequential, burst, pods = size
    async with asyncio.timeout(60):
        while not await running.leads():  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    since = (await api.request("GET", JOBS.path(namespace)))["metadata"]["resourceVersion"]
    measurement = Measurement(api, running, namespace, pods)
    watches = [
        asyncio.create_task(watch(api, namespace, since))
        for watch in (measurement.arrivals.watch_jobs, measurement.arrivals.watch_pods)
    ]
    rows = [await measurement.quiet("idle")]
    rows.append(await measurement.jobs("sequential", sequential, at_once=1))
    rows.append(await measurement.jobs("burst", burst, at_once=32))
    rows.append(await measurement.quiet("settled"))
    for watch in watches:
        watch.cancel()
    return rows


def environment(server: str) -> Row:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ("kopf", "aiohttp", "orjson", "pydantic", "kubernetes")
    return {
        "hardware": {
            "cpu": model[1] if model else platform.machine(),
            "cores": os.cpu_count(),
            "memory_gib": round(memory_gib),
        },
        "versions": {"python": platform.python_version(), "kubernetes_server": server}
        | {package: version(package) for package in packages},
    }


def print_table(rows: list[Row]) -> None:
    for row in rows:
        print(f"\n{row['case']} ({row['jobs']} jobs of {row['pods_per_job']} pods)")
        for key, value in row.items():
            if key not in ("case", "jobs", "pods_per_job"):
                print(f"  {key:<24}{value:>10}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kubeconfig", type=Path, help="cluster to measure on; default: a control plane of its own")
    parser.add_argument("--sequential", type=int, default=50, help="jobs made one after the other (default 50)")
    parser.add_argument("--burst", type=int, default=100, help="jobs made at once (default 100)")
    parser.add_argument("--pods", type=int, default=4, help="pods of each job (default 4)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "operator_latency.json")
    arguments = parser.parse_args()
    with nullcontext() if arguments.kubeconfig else control_plane() as own:
        kubeconfig = arguments.kubeconfig or own.kubeconfig
        rows, server = asyncio.run(measure(kubeconfig, arguments.sequential, arguments.burst, arguments.pods))
    print_table(rows)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"environment": environment(server), "rows": rows}, indent=2) + "\n")
    print(f"\nwritten to {arguments.output}")


if __name__ == "__main__":
    main()
