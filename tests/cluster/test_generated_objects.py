"""A real API server takes the generated objects as they are, and merges templates as we do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from api import STRATEGIC_MERGE_PATCH, BlockingApi, Object
from operator_builders import a_job

from pylon_api import names
from pylon_api.job import PylonJob
from pylon_operator.resources import build_attempt

PATHS = {"Service": "api/v1", "ConfigMap": "api/v1", "Secret": "api/v1", "Job": "apis/batch/v1"}


def in_namespace(job: PylonJob, namespace: str) -> PylonJob:
    return job.model_copy(update={"metadata": job.metadata.model_copy(update={"namespace": namespace})})


def build(job: PylonJob) -> list[Object]:
    return build_attempt(job, 1, default_image="pylon/trainer:1", token="secret")


def holds(stored: Any, sent: Any) -> bool:
    """Whether the server kept all that was sent; it may add defaults."""
    if isinstance(sent, dict):
        return all(key in stored and holds(stored[key], value) for key, value in sent.items())
    if isinstance(sent, list):
        return len(stored) == len(sent) and all(map(holds, stored, sent))
    return bool(stored == sent)


@pytest.mark.parametrize("gpus", [0, 8])
def test_objects_are_stored_as_they_are_built(api: BlockingApi, namespace: str, gpus: int) -> None:
    job = in_namespace(a_job(name="x" * names.MAX_JOB_NAME_LENGTH, gpus_per_node=gpus, training=None), namespace)
    for obj in build(job):
        path = f"/{PATHS[obj['kind']]}/namespaces/{namespace}/{obj['kind'].lower()}s"
        stored = api.create(path, obj)
        assert holds(stored, obj), f"{obj['kind']} came back changed"


TEMPLATES: dict[str, Object] = {
    "scalar and map": {"spec": {"priority": None, "nodeSelector": {"a": "b"}, "hostNetwork": True}},
    "null removes": {"spec": {"securityContext": None}},
    "map replaced": {"spec": {"securityContext": {"$patch": "replace", "runAsUser": 7}}},
    "atomic lists": {
        "spec": {
            "tolerations": [{"key": "gpu", "operator": "Exists"}],
            "containers": [
                {"name": "trainer", "command": ["sh"], "envFrom": [{"secretRef": {"name": "s"}}]},
            ],
        }
    },
    "containers": {
        "spec": {
            "containers": [{"name": "sidecar", "image": "s:1"}, {"name": "trainer", "imagePullPolicy": "Always"}],
            "initContainers": [{"name": "first", "image": "i:1"}],
        }
    },
    "env": {
        "spec": {
            "containers": [
                {
                    "name": "trainer",
                    "env": [
                        {"name": "NEW", "value": "1"},
                        {"name": "PET_MASTER_PORT", "value": "1"},
                        {"name": "HOME", "$patch": "delete"},
                    ],
                }
            ]
        }
    },
    "mounts and volumes": {
        "spec": {
            "volumes": [{"name": "data", "emptyDir": {}}, {"name": "shm", "emptyDir": {"sizeLimit": "9Gi"}}],
            "containers": [
                {
                    "name": "trainer",
                    "volumeMounts": [
                        {"name": "data", "mountPath": "/data"},
                        {"name": "data", "mountPath": "/dev/shm"},
                    ],
                }
            ],
        }
    },
    "ports": {"spec": {"containers": [{"name": "trainer", "ports": [{"containerPort": 9400, "name": "web"}]}]}},
    "other keyed lists": {
        "spec": {
            "imagePullSecrets": [{"name": "a"}],
            "hostAliases": [{"ip": "10.0.0.1", "hostnames": ["a"]}],
            "topologySpreadConstraints": [{"topologyKey": "zone", "maxSkew": 1, "whenUnsatisfiable": "DoNotSchedule"}],
        }
    },
}


@pytest.fixture
def template_path(api: BlockingApi, namespace: str) -> Iterator[str]:
    path = f"/api/v1/namespaces/{namespace}/podtemplates"
    yield path
    for stored in api.list(path):
        api.delete(f"{path}/{stored['metadata']['name']}")


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_merge_as_the_server_merges_a_strategic_patch(
    api: BlockingApi, template_path: str, name: str
) -> None:
    patch = TEMPLATES[name]

    def template(**spec: Any) -> Object:
        return build(a_job(gpus_per_node=1, **spec))[-1]["spec"]["template"]

    api.create(template_path, {"metadata": {"name": "base"}, "template": template()})
    theirs = api.patch(f"{template_path}/base", {"template": patch}, STRATEGIC_MERGE_PATCH)
    ours = api.create(template_path, {"metadata": {"name": "ours"}, "template": template(template=patch)})
    assert ours["template"] == theirs["template"]
