"""The objects of one attempt: one golden example, then what varies with the spec."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
import yaml
from operator_builders import a_job

from pylon_api import names
from pylon_api.job import PylonJob
from pylon_api.run import RunConfig
from pylon_operator.errors import TemplateError
from pylon_operator.resources import attempt_name, build_attempt, run_config, token_for

GOLDEN = Path(__file__).parent / "golden" / "attempt.yaml"
"""Two nodes of eight GPUs, attempt 3. After a wanted change: rewrite it from `objects` below and read the diff."""


def objects(job: PylonJob | None = None, attempt: int = 3, **spec: Any) -> dict[str, dict[str, Any]]:
    """By kind."""
    built = build_attempt(job or a_job(**spec), attempt, default_image="pylon/trainer:1", token="secret")
    return {obj["kind"]: obj for obj in built}


def pod(**spec: Any) -> dict[str, Any]:
    return objects(**spec)["Job"]["spec"]["template"]


def container(**spec: Any) -> dict[str, Any]:
    return pod(**spec)["spec"]["containers"][0]


def test_golden() -> None:
    built = objects(gpus_per_node=8, training={"batch": {"sequences": 16}})
    config = built["ConfigMap"]["data"].pop("run.json")
    assert list(built.values()) == list(yaml.safe_load_all(GOLDEN.read_text()))
    assert RunConfig.model_validate_json(config).world_size == 16


def test_same_job_and_attempt_give_the_same_objects() -> None:
    assert objects() == objects()


def test_the_configuration_is_the_job_as_it_was_applied() -> None:
    job = a_job(topology={"levels": ["example.com/rack"]})
    config = RunConfig.model_validate_json(objects(job)["ConfigMap"]["data"]["run.json"])
    assert config == run_config(job, 3)
    assert (config.attempt, config.nodes, config.topology_levels) == (3, 2, ["example.com/rack"])
    assert config.training == job.spec.training


def test_token_is_the_jobs_own_and_needs_the_key() -> None:
    assert objects()["Secret"]["data"] == {"token": base64.b64encode(b"secret").decode()}
    tokens = {token_for(key, uid) for key in (b"k1", b"k2") for uid in ("u1", "u2")}
    assert len(tokens) == 4
    assert token_for(b"k1", "u1") in tokens


@pytest.mark.parametrize("nodes", [1, 4096])
def test_host_names_fit_at_the_longest_job_name(nodes: int) -> None:
    name = "x" * names.MAX_JOB_NAME_LENGTH
    host_name = f"{attempt_name(name, 9999)}-{nodes - 1}"
    assert len(host_name) <= 63


@pytest.mark.parametrize(
    ("spec", "processes", "limits", "shm"),
    [
        ({}, "1", None, "1Gi"),
        ({"processes_per_node": 4}, "4", None, "1Gi"),
        ({"gpus_per_node": 2}, "2", {"nvidia.com/gpu": "2"}, "5Gi"),
        ({"gpus_per_node": 2, "gpu_resource_name": "amd.com/gpu"}, "2", {"amd.com/gpu": "2"}, "5Gi"),
        ({"gpus_per_node": 4, "processes_per_node": 2}, "2", {"nvidia.com/gpu": "4"}, "9Gi"),
    ],
)
def test_processes_and_devices(spec: dict[str, Any], processes: str, limits: Any, shm: str) -> None:
    built = pod(**spec)["spec"]
    environment = {entry["name"]: entry.get("value") for entry in built["containers"][0]["env"]}
    assert environment["PET_NPROC_PER_NODE"] == processes
    assert built["containers"][0].get("resources", {}).get("limits") == limits
    assert [v["emptyDir"]["sizeLimit"] for v in built["volumes"] if v["name"] == "shm"] == [shm]


@pytest.mark.parametrize(("timeout", "grace"), [(0, 30), (29, 30), (600, 600)])
def test_pods_get_time_to_save(timeout: int, grace: int) -> None:
    assert pod(checkpoint_timeout_seconds=timeout)["spec"]["terminationGracePeriodSeconds"] == grace


def test_the_trainer_is_told_the_grace_that_its_pod_has() -> None:
    """A container that trusts in more time than it gets is killed while it saves."""
    for spec in ({}, {"template": {"spec": {"terminationGracePeriodSeconds": 900}}}):
        built = pod(checkpoint_timeout_seconds=60, **spec)["spec"]
        told = {entry["name"]: entry.get("value") for entry in built["containers"][0]["env"]}[names.ENV_GRACE_SECONDS]
        assert told == str(built["terminationGracePeriodSeconds"]) == ("900" if spec else "60")


def test_the_trainer_learns_how_often_its_job_has_failed() -> None:
    """From which it knows how often to save."""
    job = a_job()
    job = job.model_copy(update={"status": job.status.model_copy(update={"restarts": 3, "active_seconds": 7200})})
    config = RunConfig.model_validate_json(objects(job)["ConfigMap"]["data"]["run.json"])
    assert (config.failures, config.run_seconds) == (3, 7200)


@pytest.mark.parametrize(
    ("spec", "image"),
    [
        ({}, "pylon/trainer:1"),
        ({"image": "mine:2"}, "mine:2"),
        (
            {"image": "mine:2", "template": {"spec": {"containers": [{"name": "trainer", "image": "over:3"}]}}},
            "over:3",
        ),
    ],
)
def test_image(spec: dict[str, Any], image: str) -> None:
    assert container(**spec)["image"] == image


def test_priority_class() -> None:
    assert "priorityClassName" not in pod()["spec"]
    assert pod(scheduling={"priority_class_name": "batch"})["spec"]["priorityClassName"] == "batch"


def test_template_adds_to_what_is_generated() -> None:
    template = {
        "metadata": {"labels": {"team": "llm"}, "annotations": {"note": "x"}},
        "spec": {
            "nodeSelector": {"gpu": "h100"},
            "tolerations": [{"key": "gpu", "operator": "Exists"}],
            "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "corpus"}}],
            "containers": [
                {
                    "name": "trainer",
                    "env": [{"name": "NCCL_DEBUG", "value": "INFO"}],
                    "envFrom": [{"secretRef": {"name": "s3"}}],
                    "volumeMounts": [{"name": "data", "mountPath": "/data"}],
                }
            ],
        },
    }
    plain, built = pod(), pod(template=template)
    assert built["metadata"]["labels"] == plain["metadata"]["labels"] | {"team": "llm"}
    assert built["spec"]["nodeSelector"] == {"gpu": "h100"}
    assert built["spec"]["volumes"] == template["spec"]["volumes"] + plain["spec"]["volumes"]
    trainer, base = built["spec"]["containers"][0], plain["spec"]["containers"][0]
    assert trainer["env"] == [{"name": "NCCL_DEBUG", "value": "INFO"}, *base["env"]]
    assert trainer["command"] == base["command"]
    assert trainer["volumeMounts"][0] == {"name": "data", "mountPath": "/data"}


def test_template_cannot_undo_what_fencing_rests_on() -> None:
    labels = {names.LABEL_JOB_UID: "another", names.LABEL_ATTEMPT: "1"}
    template = {"metadata": {"labels": labels}, "spec": {"restartPolicy": "Always", "subdomain": "other"}}
    assert pod(template=template) == pod()


def test_a_bad_template_is_refused_with_its_field() -> None:
    with pytest.raises(TemplateError) as error:
        objects(template={"spec": {"containers": "trainer"}})
    assert error.value.message == "spec.template.spec.containers: should be a list (got 'trainer')"
