"""PylonJobs on a real API server: applied with kubectl, run by the operator under the chart's roles, pods as processes.

Each test is a life that a user could watch with `kubectl get pylonjobs --watch`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from api import BlockingApi
from applied_job import Apply
from control_plane import Cluster, KubectlError
from gang_runner import GangRunner
from nodes import Nodes
from operator_process import ROOT, OperatorProcess
from operator_roles import ACCOUNT, running_operator
from waiting import wait_for

from pylon_api import names
from pylon_api.job import PylonJob
from pylon_operator.local.pods import PodRunner as ProcessRunner
from pylon_trainer.checkpoint.manifest import MANIFEST, Manifest

pytestmark = pytest.mark.usefixtures("crd", "operator")
helm = pytest.importorskip("helm_python", reason="Helm's engine is packaged for Linux only")

RELEASE_NAMESPACE = "pylon-system"
ENDLESS = 1_000_000


@pytest.fixture(scope="module")
def operator(
    control_plane: Cluster, api: BlockingApi, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OperatorProcess]:
    """The operator, running with no other permission than the chart grants."""
    if not control_plane.is_emulated:
        pytest.skip("pods run as processes only on a control plane of our own, and this one was given by --kubeconfig")
    files = helm.Chart.load(ROOT / "charts" / "pylon").render({}, name=ACCOUNT, namespace=RELEASE_NAMESPACE)
    objects = [obj for name, text in files.items() if name.endswith(".yaml") for obj in yaml.safe_load_all(text) if obj]
    granted = [obj for obj in objects if obj["kind"] not in ("Deployment", "Service")]
    directory = tmp_path_factory.mktemp("operator")
    with running_operator(control_plane, api, RELEASE_NAMESPACE, directory, granted) as running:
        yield running


@pytest.fixture
def pod_runner(tmp_path: Path) -> GangRunner:
    paths = ":".join(str(ROOT / folder) for folder in ("crds", "operator", "trainer"))
    return GangRunner(ProcessRunner(tmp_path / "pods", {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}))


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A glob over a little text that a small model learns within a few steps."""
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text("a tree is a tree is a tree\n" * 200)
    return f"{tmp_path}/*.txt"


def manifest(text: str, tmp_path: Path, *, name: str = "tree", steps: int, **spec: Any) -> dict[str, Any]:
    """A job of seconds: a model of one block on one or more CPU pods."""
    training = {
        "model": {"layers": 1, "hiddenSize": 32, "heads": 2},
        "data": {"train": [text], "sequenceLength": 32, "prefetchBatches": 0},
        "optimizer": {"learningRate": 0.01},
        "schedule": {"steps": steps, "warmupSteps": 2},
        "batch": {"sequences": 4},
        "precision": "Float32",
        "logIntervalSteps": 5,
        "checkpoint": {"uri": f"file://{tmp_path}/checkpoints", "intervalSteps": 20},
        "evaluation": {"intervalSteps": 0, "sequences": 4},
    }
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": name},
        "spec": {"training": training, "failurePolicy": {"backoffSeconds": 0}, **spec},
    }


def restored_step(log: str) -> int:
    """Step of the checkpoint that a trainer says it began from."""
    return int(re.findall(r"^step=(\d+) restored=", log, re.MULTILINE)[0])


def test_quickstart_trains_to_the_end(
    apply: Apply, control_plane: Cluster, nodes: Nodes, namespace: str, tmp_path: Path
) -> None:
    """examples/quickstart.yaml, fewer steps of a smaller batch, otherwise as it stands."""
    nodes.add("node-0", gpus=8)
    quickstart = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text())
    training = quickstart["spec"]["training"]
    training["schedule"] |= {"steps": 140, "warmupSteps": 10}
    training["batch"] = {"sequences": 4}
    training["data"]["sequenceLength"] = 64
    training["checkpoint"] |= {"uri": f"file://{tmp_path}/checkpoints", "intervalSteps": 50}
    training["evaluation"] |= {"sequences": 4, "sampleTokens": 20}
    training["logIntervalSteps"] = 10
    losses = []

    job = apply(quickstart)

    def ended(seen: PylonJob) -> bool:
        if seen.status.training and seen.status.training.loss is not None:
            losses.append(seen.status.training.loss)
        return seen.status.completion_time is not None

    job.wait(ended, "the end")
    assert job.condition("Succeeded")[:2] == ("True", "Completed")
    status = job.seen.status
    assert status.training is not None
    assert status.training.step == status.training.total_steps == 140
    assert losses[-1] < losses[0], losses
    assert losses[-1] < 3.25, "below the unigram entropy of the text; a uniform guess has 5.5"
    assert all(loss == round(loss, 4) for loss in losses), "a column for people"
    assert status.training.sample
    assert status.training.export_uri
    assert status.checkpoint is not None
    assert status.checkpoint.step == 140
    row = control_plane.kubectl("--namespace", namespace, "get", "pj", job.name).splitlines()[1].split()
    assert row[:3] + row[4:5] == [job.name, "True", "Completed", "140"]
    events = control_plane.kubectl("--namespace", namespace, "get", "events", "--output", "jsonpath={.items[*].reason}")
    assert {"Created", "Training", "Completed"} <= set(events.split())


def test_a_killed_pod_restarts_the_gang_from_the_committed_step(
    apply: Apply, nodes: Nodes, namespace: str, text: str, tmp_path: Path
) -> None:
    nodes.add("node-0", "node-1", gpus=8)
    job = apply(manifest(text, tmp_path, steps=ENDLESS, nodes=2))
    committed = job.wait_for_commit()
    victim = next(pod for pod in nodes.live_pods(namespace) if pod.startswith("tree-a1-1"))

    nodes.kill_pod(namespace, victim)

    job.wait(lambda seen: "-attempt-000002-" in seen.status.checkpoint.uri, "attempt 2 trains and commits")
    seen = job.seen.status
    assert seen.restarts == 1
    assert seen.failures[0].exit_code == 137
    assert seen.failures[0].pod == victim
    rank_zero = next(pod for pod in nodes.live_pods(namespace) if pod.startswith("tree-a2-0"))
    assert restored_step(nodes.logs(namespace, rank_zero)) >= committed
    checkpoint = seen.checkpoint
    assert checkpoint is not None
    assert checkpoint.attempt == 2
    assert checkpoint.step > committed
    assert checkpoint.uri.startswith(f"file://{tmp_path}/checkpoints/{namespace}/tree-")
    assert checkpoint.size_bytes
    assert checkpoint.committed_time
    said = r"Step \d+ at file://\S+-attempt-000002-\w+, [\d.]+ kB, committed at [-\d]+ [:\d]+ UTC"
    assert re.fullmatch(said, job.condition("CheckpointReady")[2])
    assert all(pod.startswith("tree-a2-") for pod in nodes.live_pods(namespace)), "one gang lives"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("consensus", "counter"),
    [({"codec": "Auto", "bytesPerStep": 12_000}, "steps"), ({"codec": "Sign", "localSteps": 8}, "turn")],
    ids=["gradients", "weights"],
)
def test_resonate_in_few_bytes_goes_on_after_a_killed_pod(
    apply: Apply, nodes: Nodes, namespace: str, text: str, tmp_path: Path, consensus: dict[str, Any], counter: str
) -> None:
    """examples/resonate.yaml, small, in 2 pods of 2 processes. What the exchange has not sent yet goes on as well."""
    nodes.add("node-0", "node-1", gpus=8)
    example = yaml.safe_load((ROOT / "examples" / "resonate.yaml").read_text())["spec"]["training"]
    spec = manifest(text, tmp_path, steps=ENDLESS, nodes=2, processesPerNode=2)
    spec["spec"]["training"] |= {
        "model": example["model"] | {"layers": 2, "hiddenSize": 64, "resonate": {"attentionEvery": 2}},
        "consensus": consensus | {"hashCheckSteps": 10, "onDisagreement": "Stop"},
    }
    job = apply(spec)
    committed = job.wait_for_commit()
    before = job.seen.status.training
    assert before is not None
    assert before.loss is not None
    victim = next(pod for pod in nodes.live_pods(namespace) if pod.startswith("tree-a1-1"))

    nodes.kill_pod(namespace, victim)

    job.wait(lambda seen: "-attempt-000002-" in seen.status.checkpoint.uri, "attempt 2 trains and commits")
    seen = job.seen.status
    assert (seen.restarts, seen.failures[0].pod, seen.failures[0].exit_code) == (1, victim, 137)
    assert seen.checkpoint is not None
    assert seen.training is not None
    assert seen.training.bytes_per_step is not None
    assert 0 < seen.training.bytes_per_step <= 12_000
    assert seen.training.skipped_steps == 0
    rank_zero = next(pod for pod in nodes.live_pods(namespace) if pod.startswith("tree-a2-0"))
    log = nodes.logs(namespace, rank_zero)
    assert restored_step(log) >= committed
    losses = [float(loss) for loss in re.findall(r" loss=([\d.]+)", log)]
    assert losses[0] < before.loss + 0.3, "it goes on, and does not begin anew: a uniform guess has 5.5"
    assert losses[-1] < 4.0
    saved = Manifest.parse(Path(seen.checkpoint.uri.removeprefix("file://"), MANIFEST).read_bytes())
    counted = [own["exchange"][counter] for own in saved.own]
    assert counted == [saved.step] * 4, "no rank's exchange has begun anew"


@pytest.mark.slow
def test_a_dead_node_holds_up_neither_job_nor_next_attempt(
    apply: Apply, nodes: Nodes, namespace: str, text: str, tmp_path: Path
) -> None:
    """Its pod never ends, for no kubelet says so: after grace and patience it is removed by force."""
    nodes.add("node-0", gpus=8)
    evict_soon = {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "tolerationSeconds": 1}
    template = {"spec": {"tolerations": [{**evict_soon, "effect": "NoExecute"}]}}
    job = apply(manifest(text, tmp_path, steps=ENDLESS, checkpointTimeoutSeconds=0, template=template))
    committed = job.wait_for_commit()

    nodes.lose("node-0")
    nodes.add("node-1", gpus=8)

    job.wait(lambda seen: "-attempt-000002-" in seen.status.checkpoint.uri, "attempt 2 commits", 240)
    assert job.seen.status.failures[0].reason in ("NodeLost", "PodEvicted", "Preempted")
    assert [pod.node for pod in nodes.pods() if pod.namespace == namespace] == ["node-1"]
    rank_zero = next(pod for pod in nodes.live_pods(namespace) if pod.startswith("tree-a2-0"))
    assert restored_step(nodes.logs(namespace, rank_zero)) >= committed


def test_a_pod_that_is_told_to_go_saves_first(
    apply: Apply, control_plane: Cluster, nodes: Nodes, namespace: str, text: str, tmp_path: Path
) -> None:
    """The whole gang does, at one agreed step, within the grace of the one pod."""
    nodes.add("node-0", gpus=8)
    job_manifest = manifest(text, tmp_path, steps=ENDLESS, nodes=2)
    job_manifest["spec"]["training"]["checkpoint"]["intervalSteps"] = 0
    job = apply(job_manifest)
    job.wait_for_step(20)

    victim = next(pod for pod in nodes.live_pods(namespace) if pod.startswith("tree-a1-1"))
    control_plane.kubectl("--namespace", namespace, "delete", "pod", victim, "--wait=false")

    job.wait(lambda seen: seen.status.attempt == 2 and seen.status.checkpoint, "attempt 2 knows of the checkpoint")
    checkpoint = job.seen.status.checkpoint
    assert checkpoint is not None
    assert checkpoint.attempt == 1
    job.wait_for_step(checkpoint.step + 1)
    rank_zero = next(pod for pod in nodes.live_pods(namespace) if pod.startswith("tree-a2-0"))
    assert restored_step(nodes.logs(namespace, rank_zero)) == checkpoint.step >= 20


def test_suspend_saves_first_and_resume_goes_on(
    apply: Apply, nodes: Nodes, namespace: str, text: str, tmp_path: Path
) -> None:
    nodes.add("node-0", gpus=8)
    job_manifest = manifest(text, tmp_path, steps=ENDLESS)
    job_manifest["spec"]["training"]["checkpoint"]["intervalSteps"] = 0  # only what is asked for is saved
    job = apply(job_manifest)
    job.wait_for_step(20)

    job.patch(suspend=True)
    job.wait(lambda _: job.condition("Suspended")[0] == "True", "suspended")
    suspended = job.seen.status
    assert suspended.checkpoint is not None
    assert suspended.training is not None
    assert suspended.checkpoint.step >= 20
    assert nodes.live_pods(namespace) == []

    job.patch(suspend=False)
    step = suspended.training.step
    job.wait(lambda seen: seen.status.phase == "Running" and seen.status.training.step > step, "it goes on")
    assert job.seen.status.attempt == 2
    rank_zero = next(pod for pod in nodes.live_pods(namespace) if pod.startswith("tree-a2-0"))
    assert restored_step(nodes.logs(namespace, rank_zero)) >= suspended.checkpoint.step
    assert job.seen.status.restarts == 0, "a resume is no restart"
    assert job.condition("Suspended")[0] == "False"


def test_training_goes_on_while_its_store_refuses(
    apply: Apply, nodes: Nodes, namespace: str, text: str, tmp_path: Path
) -> None:
    """A file stands where the directory of checkpoints was, so that nothing can be written below it."""
    nodes.add("node-0", gpus=8)
    job = apply(manifest(text, tmp_path, steps=ENDLESS))
    job.wait_for_commit()
    store, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"

    store.rename(elsewhere)
    store.touch()

    job.wait_for_condition("CheckpointReady", "False", "SavesFail", "newest committed: Step ")
    step = job.seen.status.training.step  # type: ignore[union-attr]  # it has trained: it has committed
    job.wait_for_step(step + 20)
    store.unlink()
    elsewhere.rename(store)
    job.wait_for_condition("CheckpointReady", "True", "Committed")
    assert (job.seen.status.attempt, job.seen.status.restarts) == (1, 0)
    assert job.events().count("SavesFail") == 1


def test_a_job_begins_where_another_has_ended(
    apply: Apply, nodes: Nodes, namespace: str, text: str, tmp_path: Path
) -> None:
    nodes.add("node-0", gpus=8)
    first = apply(manifest(text, tmp_path, name="first", steps=20))
    first.wait(lambda seen: seen.status.completion_time, "the end of the first")
    ended = first.seen.status.checkpoint
    assert ended is not None

    second = manifest(text, tmp_path, name="second", steps=ENDLESS)
    newest = ended.uri.rpartition("/")[0] + "/latest"
    second["spec"]["training"]["checkpoint"]["restoreFrom"] = {"uri": newest}
    job = apply(second)
    job.wait_for_step(21)

    rank_zero = next(pod for pod in nodes.live_pods(namespace) if pod.startswith("second-a1-0"))
    assert f"step=20 restored={ended.uri}" in nodes.logs(namespace, rank_zero)


def test_training_goes_on_while_the_operator_is_dead(
    apply: Apply, operator: OperatorProcess, nodes: Nodes, namespace: str, text: str, tmp_path: Path
) -> None:
    nodes.add("node-0", gpus=8)
    job = apply(manifest(text, tmp_path, steps=ENDLESS))
    job.wait_for_step(5)
    before = nodes.live_pods(namespace)

    operator.kill()
    step = job.seen.status.training.step  # type: ignore[union-attr]  # it has trained: wait_for_step saw it
    operator.start()

    job.wait_for_step(step + 20)
    assert nodes.live_pods(namespace) == before, "neither restarted nor doubled"
    assert job.seen.status.attempt == 1


def test_what_only_a_person_can_mend_fails_at_once_with_the_trainers_words(
    apply: Apply, nodes: Nodes, tmp_path: Path
) -> None:
    nodes.add("node-0", gpus=8)
    job = apply(manifest(f"{tmp_path}/nothing/*.txt", tmp_path, steps=10))
    job.wait(lambda seen: seen.status.completion_time, "the end")
    status, reason, message = job.condition("Succeeded")
    assert (status, reason) == ("False", "UserError")
    assert f"{tmp_path}/nothing/*.txt" in message
    assert job.seen.status.restarts == 0


def test_two_jobs_of_one_name_do_not_meet(
    apply: Apply, api: BlockingApi, nodes: Nodes, namespace: str, text: str, tmp_path: Path
) -> None:
    nodes.add("node-0", gpus=8)
    other = f"{namespace}-other"
    api.create("/api/v1/namespaces", {"metadata": {"name": other}})
    wait_for(lambda: api.list(f"/api/v1/namespaces/{other}/serviceaccounts"), message="its ServiceAccount")
    jobs = [apply(manifest(text, tmp_path, steps=20), place) for place in (namespace, other)]
    for job in jobs:
        job.wait(lambda seen: seen.status.completion_time, "the end")
        assert job.condition("Succeeded")[0] == "True"
    uris = {job.seen.status.checkpoint.uri for job in jobs}  # type: ignore[union-attr]  # both have saved
    assert len(uris) == 2
    api.delete(f"/api/v1/namespaces/{other}")


def test_deletion_leaves_nothing_behind(apply: Apply, nodes: Nodes, namespace: str, text: str, tmp_path: Path) -> None:
    nodes.add("node-0", gpus=8)
    job = apply(manifest(text, tmp_path, steps=ENDLESS))
    job.wait_for_step(5)

    job.delete()

    wait_for(lambda: not job.children(), 60, "the garbage collector has taken every object of the job")
    wait_for(lambda: not nodes.live_pods(namespace), 60, "its processes are gone")


def test_kubectl_refuses_a_bad_manifest_and_names_the_field(apply: Apply, text: str, tmp_path: Path) -> None:
    bad = manifest(text, tmp_path, steps=10)
    bad["spec"]["training"]["schedule"]["tokens"] = 100
    with pytest.raises(KubectlError, match="set exactly one of steps and tokens"):
        apply(bad)
