"""What a container of a pod would run and see, in the terms of this machine. Starts nothing and writes nothing."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from pylon_api import names
from pylon_operator.local.volumes import Object, PodError, find_object, read_field

_REFERENCE = re.compile(r"\$(?:\$|\(([A-Za-z_][-A-Za-z0-9_.]*)\))")


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
