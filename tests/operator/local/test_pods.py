"""Pods as processes: what a pod can see, how it ends, and that nothing of it stays behind."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from pylon_api import names
from pylon_operator.local.container import expand, localize
from pylon_operator.local.pods import PodProcess, PodRunner
from pylon_operator.local.volumes import PodError

Start = Callable[..., PodProcess]

CONFIG_MAPS = {"settings": {"data": {"run.json": '{"a": 1}', "color": "red"}}}
SECRETS = {"token": {"data": {"token": base64.b64encode(b"s3cret").decode()}}}
ADDRESS = "127.0.0.1"


def make_pod(script: str = "", *, name: str = "demo-a1-0", **container: Any) -> dict[str, Any]:
    """A pod that runs a Python script; `container` adds to or replaces fields of its container."""
    volumes = container.pop("volumes", [])
    return {
        "metadata": {
            "name": name,
            "namespace": "default",
            "labels": {"pylon.dev/job": "demo"},
            "annotations": {"note": "hello"},
        },
        "spec": {
            "volumes": volumes,
            "containers": [{"name": "trainer", "command": ["python", "-c", textwrap.dedent(script)]} | container],
        },
    }


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    runner = PodRunner(tmp_path / "logs")
    started: list[PodProcess] = []

    def start(pod: dict[str, Any], **more: Any) -> PodProcess:
        objects = {"config_maps": CONFIG_MAPS, "secrets": SECRETS, "address": ADDRESS, "hosts": {}}
        started.append((more.pop("runner", None) or runner).start(pod, **(objects | more)))
        return started[-1]

    yield start
    for pod in started:
        pod.kill()
        await pod.wait()


async def until(condition: Callable[[], Any]) -> Any:
    """The first true value of a condition."""
    async with asyncio.timeout(20):
        while not (value := condition()):
            await asyncio.sleep(0.02)
    return value


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    table = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(table.stdout.strip()) and not table.stdout.startswith("Z")


async def output(pod: PodProcess) -> Any:
    """What a pod printed as JSON, once it has ended well."""
    assert await pod.wait() == 0, pod.logs()
    return json.loads(pod.logs())


PRINT_ENVIRONMENT = "import json, os; print(json.dumps(dict(os.environ)))"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ({"value": "plain"}, "plain"),
        ({"value": "$(FIRST)/x $$(FIRST) $(NOBODY)"}, "one/x $(FIRST) $(NOBODY)"),
        ({"valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}, "demo-a1-0"),
        ({"valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['pylon.dev/job']"}}}, "demo"),
        ({"valueFrom": {"fieldRef": {"fieldPath": "metadata.annotations['note']"}}}, "hello"),
        ({"valueFrom": {"fieldRef": {"fieldPath": "metadata.annotations['absent']"}}}, ""),
        ({"valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}, ADDRESS),
        ({"valueFrom": {"configMapKeyRef": {"name": "settings", "key": "color"}}}, "red"),
        ({"valueFrom": {"secretKeyRef": {"name": "token", "key": "token"}}}, "s3cret"),
        ({"valueFrom": {"secretKeyRef": {"name": "no", "key": "k", "optional": True}}}, None),
        ({"value": "demo-a1-0.demo-a1:29400"}, "127.0.0.9:29400"),
        ({"value": "not-demo-a1-0.demo-a1"}, "not-demo-a1-0.demo-a1"),
    ],
)
async def test_environment(start: Start, variable: dict[str, Any], value: str | None) -> None:
    env = [{"name": "FIRST", "value": "one"}, {"name": "IT"} | variable]
    hosts = {"demo-a1-0.demo-a1": "127.0.0.9"}
    seen = await output(start(make_pod(PRINT_ENVIRONMENT, env=env), hosts=hosts))
    assert seen.get("IT") == value


async def test_inherits_the_users_environment_but_not_what_looks_like_the_pods(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "mine")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    for leak in ("RANK", "PET_NNODES", "PYLON_CONFIG", "MASTER_ADDR", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.setenv(leak, "leak")
    seen = await output(start(make_pod(PRINT_ENVIRONMENT)))
    assert seen["AWS_PROFILE"] == "mine"
    assert seen["PYTHONPATH"] == "/somewhere"
    assert "leak" not in seen.values()
    assert seen[names.ENV_STATUS_HOST] == ADDRESS
    assert Path(seen["TMPDIR"]).parent.name.startswith("pylon-")


async def test_env_from_and_prefix(start: Start) -> None:
    sources = [{"configMapRef": {"name": "settings"}, "prefix": "C_"}, {"secretRef": {"name": "token"}}]
    seen = await output(start(make_pod(PRINT_ENVIRONMENT, envFrom=sources)))
    assert (seen["C_color"], seen["token"]) == ("red", "s3cret")


async def test_ports_are_mapped_where_named_as_ports(start: Start) -> None:
    env = [{"name": "PET_MASTER_PORT", "value": "29400"}, {"name": "COUNT", "value": "29400"}]
    seen = await output(start(make_pod(PRINT_ENVIRONMENT, env=env), ports={29400: 4711}))
    assert (seen["PET_MASTER_PORT"], seen["COUNT"]) == ("4711", "29400")


async def test_volumes_are_directories_and_paths_follow(start: Start) -> None:
    script = """
        import json, os, pathlib, sys
        config = pathlib.Path(os.environ["CONFIG"])
        scratch = pathlib.Path(os.environ["SCRATCH"]); (scratch / "x").write_text("x")
        print(json.dumps({
            "config": config.read_text(), "files": sorted(os.listdir(config.parent)),
            "token": pathlib.Path(sys.argv[1]).read_text(), "labels": pathlib.Path(sys.argv[2]).read_text(),
            "elsewhere": os.environ["ELSEWHERE"], "shm": pathlib.Path(sys.argv[3]).is_dir(),
        }))
    """
    downward = [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]
    pod = make_pod(
        script,
        args=["/etc/t/token", "/etc/d/labels", "/dev/shm"],
        env=[
            {"name": "CONFIG", "value": "/etc/c/run.json"},
            {"name": "SCRATCH", "value": "/scratch"},
            {"name": "ELSEWHERE", "value": "/etc/cc/run.json"},
        ],
        volumes=[
            {"name": "c", "configMap": {"name": "settings", "items": [{"key": "run.json", "path": "run.json"}]}},
            {"name": "t", "projected": {"sources": [{"secret": {"name": "token"}}]}},
            {"name": "d", "downwardAPI": {"items": downward}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
            {"name": "scratch", "emptyDir": {}},
        ],
        volumeMounts=[
            {"name": "c", "mountPath": "/etc/c"},
            {"name": "t", "mountPath": "/etc/t"},
            {"name": "d", "mountPath": "/etc/d/"},
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "scratch", "mountPath": "/scratch"},
        ],
    )
    assert await output(start(pod)) == {
        "config": '{"a": 1}',
        "files": ["run.json"],
        "token": "s3cret",
        "labels": 'pylon.dev/job="demo"',
        "elsewhere": "/etc/cc/run.json",
        "shm": True,
    }


async def test_an_annotation_set_later_reaches_the_pod(start: Start) -> None:
    script = """
        import os, pathlib, time
        file = pathlib.Path(os.environ["FILE"])
        print("before:", file.read_text(), flush=True)
        while not file.read_text():
            time.sleep(0.01)
        print("after:", file.read_text())
    """
    item = {"path": "topology", "fieldRef": {"fieldPath": f"metadata.annotations['{names.ANNOTATION_TOPOLOGY}']"}}
    pod = start(
        make_pod(
            script,
            env=[{"name": "FILE", "value": "/t/topology"}],
            volumes=[{"name": "t", "downwardAPI": {"items": [item]}}],
            volumeMounts=[{"name": "t", "mountPath": "/t"}],
        )
    )
    await until(pod.logs)
    pod.update_annotations({names.ANNOTATION_TOPOLOGY: '["zone-a"]'})
    assert await pod.wait() == 0
    assert pod.logs() == 'before: \nafter: ["zone-a"]\n'


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "x"}}]}, "persistentVolumeClaim"),
        ({"volumes": [{"name": "v", "configMap": {"name": "absent"}}]}, "ConfigMap 'absent' not found"),
        ({"envFrom": [{"secretRef": {"name": "absent"}}]}, "Secret 'absent' not found"),
        ({"env": [{"name": "A", "valueFrom": {"resourceFieldRef": {}}}]}, "resourceFieldRef"),
        ({"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "token", "key": "z"}}}]}, "no key 'z'"),
        ({"command": []}, "no command"),
    ],
)
async def test_what_cannot_be_had_locally_is_said(start: Start, change: dict[str, Any], problem: str) -> None:
    with pytest.raises(PodError, match=problem):
        start(make_pod(**change))


@pytest.mark.parametrize(
    ("script", "code", "message"),
    [
        ("import os, pathlib; pathlib.Path(os.environ['PYLON_TERMINATION_LOG']).write_text('bye')", 0, "bye"),
        ("raise SystemExit('no such thing')", 1, "no such thing"),
        ("raise SystemExit(78)", 78, ""),
        ("import os; os.kill(os.getpid(), 9)", 137, ""),
    ],
)
async def test_exit_code_and_last_words(start: Start, script: str, code: int, message: str) -> None:
    pod = start(make_pod(script, terminationMessagePolicy="FallbackToLogsOnError"))
    assert await pod.wait() == code
    assert pod.termination_message().strip() == message


async def test_a_command_that_is_not_there(start: Start) -> None:
    pod = start(make_pod(command=["no-such-program"]))
    assert await pod.wait() == 127
    assert "no-such-program: No such file" in pod.logs()


FAMILY = """
    import os, signal, subprocess, sys, time
    # As torchrun does: each worker in a session of its own, so a signal to the group never reaches it.
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    print(os.getpid(), worker.pid, flush=True)
    if {stubborn}:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("ready", flush=True)
    {then}
    time.sleep(600)
"""


async def start_family(start: Start, *, stubborn: bool = False, then: str = "") -> tuple[PodProcess, list[int]]:
    pod = start(make_pod(textwrap.dedent(FAMILY).format(stubborn=stubborn, then=then)))
    await until(lambda: "ready" in pod.logs())
    return pod, [int(pid) for pid in pod.logs().split()[:2]]


@pytest.mark.parametrize("end", ["kill", "terminate", "stubborn", "process 1 killed", "process 1 exits"])
async def test_nothing_of_a_pod_outlives_it(start: Start, end: str) -> None:
    then = "raise SystemExit(3)" if end == "process 1 exits" else ""
    pod, pids = await start_family(start, stubborn=end == "stubborn", then=then)
    assert pod.pid == pids[0]
    match end:
        case "kill":
            pod.kill()
        case "terminate":
            pod.terminate(grace_seconds=60)
        case "stubborn":
            pod.terminate(grace_seconds=0.1)
        case "process 1 killed":
            os.kill(pod.pid, signal.SIGKILL)
    code = await pod.wait()
    assert code == {"terminate": 143, "process 1 exits": 3}.get(end, 137)
    assert not any(is_running(pid) for pid in pids)


async def test_sigterm_goes_to_process_1_only_and_grace_is_honoured(start: Start) -> None:
    script = """
        import os, signal, subprocess, sys, time
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        def leave(*_):
            time.sleep(0.2)
            print("worker lives" if worker.poll() is None else "worker died", flush=True)
            os._exit(75)
        signal.signal(signal.SIGTERM, leave)
        print("ready", flush=True)
        worker.wait()
    """
    pod = start(make_pod(script))
    await until(lambda: "ready" in pod.logs())
    pod.terminate(grace_seconds=30)
    pod.terminate(grace_seconds=30)
    assert await pod.wait() == 75
    assert "worker lives" in pod.logs()
    pod.terminate(grace_seconds=1)  # of a pod that has gone: nothing happens


async def test_the_death_of_the_runner_takes_its_pods_along(tmp_path: Path) -> None:
    script = f"""
        import asyncio, json, pathlib
        from pylon_operator.local.pods import PodRunner
        pod = json.loads({json.dumps(json.dumps(make_pod(textwrap.dedent(FAMILY).format(stubborn=True, then=""))))})
        runner = PodRunner(pathlib.Path({str(tmp_path)!r}))
        asyncio.run(runner.start(pod, config_maps={{}}, secrets={{}}, address="127.0.0.1", hosts={{}}).wait())
    """
    runner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    log = tmp_path / "demo-a1-0.log"
    await until(lambda: log.exists() and "ready" in log.read_text())
    pids = [int(pid) for pid in log.read_text().split()[:2]]
    assert all(is_running(pid) for pid in pids)
    runner.kill()
    runner.wait()
    await until(lambda: not any(is_running(pid) for pid in pids))


async def test_the_pods_directory_goes_with_it(start: Start) -> None:
    pod = start(make_pod("import os; print(os.environ['TMPDIR'])"))
    await pod.wait()
    assert not Path(pod.logs().strip()).parent.exists()


async def test_gpus_are_divided_and_given_back(start: Start, tmp_path: Path) -> None:
    runner = PodRunner(tmp_path, gpus=("0", "1", "2"))
    script = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(600)"

    def ask(name: str, gpus: int) -> PodProcess:
        resources = {"limits": {"nvidia.com/gpu": str(gpus)}} if gpus else {}
        return start(make_pod(script, name=name, resources=resources), runner=runner)

    first, second, third = ask("a", 2), ask("b", 1), ask("c", 0)
    assert [await until(pod.logs) for pod in (first, second, third)] == ["0,1\n", "2\n", "\n"]
    with pytest.raises(PodError, match="asks for 1 GPUs, 0 of 3 are free"):
        ask("d", 1)
    first.kill()
    await first.wait()
    assert await until(ask("e", 1).logs) == "0\n"


def test_localize_takes_the_longest_path() -> None:
    paths = {"/etc/pylon": Path("/a"), "/etc/pylon/config": Path("/b")}
    assert localize("/etc/pylon/config/run.json", paths, {}) == "/b/run.json"
    assert localize("/etc/pylon/x", paths, {}) == "/a/x"
    assert localize("/etc/pylons", paths, {}) == "/etc/pylons"


def test_expand_leaves_unknown_names() -> None:
    assert expand("$(A) $(B) $$(A) $A", {"A": "1"}) == "1 $(B) $(A) $A"
