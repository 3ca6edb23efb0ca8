"""Strategic merge, list by list."""

from __future__ import annotations

from typing import Any

import pytest

from pylon_operator.errors import TemplateError
from pylon_operator.merge import merge_template


def named(*items: dict[str, Any]) -> dict[str, Any]:
    return {"containers": list(items)}


@pytest.mark.parametrize(
    ("base", "patch", "merged"),
    [
        pytest.param({"a": 1, "b": 2}, {"b": 3}, {"a": 1, "b": 3}, id="scalar"),
        pytest.param({"a": 1, "b": 2}, {"b": None}, {"a": 1}, id="null removes"),
        pytest.param({"m": {"a": 1}}, {"m": {"b": 2}}, {"m": {"a": 1, "b": 2}}, id="map"),
        pytest.param({"m": {"a": 1}}, {"m": {"$patch": "replace", "b": 2}}, {"m": {"b": 2}}, id="map replaced"),
        pytest.param({}, {"m": {"a": None, "b": 1}}, {"m": {"b": 1}}, id="null in a new map"),
        pytest.param({"command": ["a"]}, {"command": ["b", "c"]}, {"command": ["b", "c"]}, id="atomic list"),
        pytest.param(
            {"tolerations": [{"key": "a"}]},
            {"tolerations": [{"key": "b"}]},
            {"tolerations": [{"key": "b"}]},
            id="tolerations have no key",
        ),
        pytest.param(
            named({"name": "trainer", "image": "a"}),
            named({"name": "trainer", "image": "b"}, {"name": "sidecar"}),
            named({"name": "trainer", "image": "b"}, {"name": "sidecar"}),
            id="containers",
        ),
        pytest.param(
            named({"name": "a"}, {"name": "b"}, {"name": "c"}),
            named({"name": "new"}, {"name": "b"}, {"name": "newer"}),
            named({"name": "new"}, {"name": "a"}, {"name": "b"}, {"name": "newer"}, {"name": "c"}),
            id="the server's order",
        ),
        pytest.param(
            {"initContainers": [{"name": "a", "image": "x"}]},
            {"initContainers": [{"name": "a", "tty": True}]},
            {"initContainers": [{"name": "a", "image": "x", "tty": True}]},
            id="initContainers",
        ),
        pytest.param(
            {"env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]},
            {"env": [{"name": "B", "value": "3"}, {"name": "C", "value": "4"}]},
            {"env": [{"name": "A", "value": "1"}, {"name": "B", "value": "3"}, {"name": "C", "value": "4"}]},
            id="env",
        ),
        pytest.param(
            {"env": [{"name": "A", "value": "1"}]},
            {"env": [{"name": "A", "$patch": "delete"}]},
            {"env": []},
            id="delete",
        ),
        pytest.param(
            {"ports": [{"containerPort": 80, "name": "a"}]},
            {"ports": [{"containerPort": 80, "protocol": "UDP"}, {"containerPort": 80, "protocol": "TCP"}]},
            {
                "ports": [
                    {"containerPort": 80, "protocol": "UDP"},
                    {"containerPort": 80, "name": "a", "protocol": "TCP"},
                ]
            },
            id="ports by number and protocol, TCP by default",
        ),
        pytest.param(
            {"volumeMounts": [{"mountPath": "/a", "name": "x"}]},
            {"volumeMounts": [{"mountPath": "/a", "name": "y"}, {"mountPath": "/b", "name": "x"}]},
            {"volumeMounts": [{"mountPath": "/a", "name": "y"}, {"mountPath": "/b", "name": "x"}]},
            id="volumeMounts",
        ),
        pytest.param(
            {"volumes": [{"name": "scratch", "emptyDir": {}}, {"name": "b", "emptyDir": {}}]},
            {"volumes": [{"name": "scratch", "persistentVolumeClaim": {"claimName": "c"}}]},
            {
                "volumes": [
                    {"name": "scratch", "persistentVolumeClaim": {"claimName": "c"}},
                    {"name": "b", "emptyDir": {}},
                ]
            },
            id="volumes keep only the new source",
        ),
        pytest.param(
            {"volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}]},
            {"volumes": [{"name": "shm", "emptyDir": {"sizeLimit": "9Gi"}}]},
            {"volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "9Gi"}}]},
            id="volumes merge inside one source",
        ),
        pytest.param(
            {"imagePullSecrets": [{"name": "a"}]},
            {"imagePullSecrets": [{"name": "b"}]},
            {"imagePullSecrets": [{"name": "b"}, {"name": "a"}]},
            id="imagePullSecrets",
        ),
        pytest.param(
            {"hostAliases": [{"ip": "1.1.1.1", "hostnames": ["a"]}]},
            {"hostAliases": [{"ip": "1.1.1.1", "hostnames": ["b"]}]},
            {"hostAliases": [{"ip": "1.1.1.1", "hostnames": ["b"]}]},
            id="hostAliases",
        ),
    ],
)
def test_merge(base: dict[str, Any], patch: dict[str, Any], merged: dict[str, Any]) -> None:
    before = repr(base)
    assert merge_template(base, patch) == merged
    assert repr(base) == before, "the generated template must not change"


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        ({"containers": {"name": "trainer"}}, "spec.template.containers: should be a list"),
        ({"containers": ["trainer"]}, "spec.template.containers[0]: should be an object"),
        ({"containers": [{"image": "x"}]}, "spec.template.containers[0].name: required"),
        ({"metadata": "x"}, "spec.template.metadata: should be an object"),
        ({"metadata": {"$retainKeys": []}}, "spec.template.metadata.$retainKeys: only"),
    ],
)
def test_a_template_that_cannot_be_merged_names_its_field(patch: dict[str, Any], message: str) -> None:
    with pytest.raises(TemplateError) as error:
        merge_template({"metadata": {}, "containers": []}, patch)
    assert error.value.message.startswith(message)
