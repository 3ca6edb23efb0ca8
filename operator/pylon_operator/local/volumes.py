"""Turns a pod's volumes into directories and its references into strings, as a kubelet does before containers start.

Nothing is mounted: `pods.py` rewrites paths instead. Volumes that need a cluster (claims, CSI, NFS, ...) are refused.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Object = Mapping[str, Any]
"""A Kubernetes object in its JSON form."""

_KEYED_FIELD = re.compile(r"metadata\.(labels|annotations)\['(.+)'\]")


class PodError(Exception):
    """A pod cannot be run as a process. The text is one line for a person."""


def read_field(pod: Object, path: str, address: str) -> str:
    """The value of a downward-API `fieldPath`; a label or annotation that is not there is the empty string."""
    metadata = pod["metadata"]
    if keyed := _KEYED_FIELD.fullmatch(path):
        return str(metadata.get(keyed[1], {}).get(keyed[2], ""))
    if path in ("metadata.labels", "metadata.annotations"):
        entries = metadata.get(path.removeprefix("metadata."), {})
        return "\n".join(f"{key}={json.dumps(value)}" for key, value in sorted(entries.items()))
    if path in ("status.podIP", "status.podIPs", "status.hostIP"):
        return address
    if path in ("metadata.name", "metadata.namespace", "metadata.uid"):
        return str(metadata.get(path.removeprefix("metadata."), ""))
    if path == "spec.nodeName":
        return str(pod["spec"].get("nodeName", ""))
    raise PodError(f"pod {metadata['name']}: fieldPath {path!r} has no meaning outside a cluster")


def find_object(objects: Mapping[str, Object], kind: str, reference: Object) -> dict[str, bytes] | None:
    """The entries of a ConfigMap or Secret that a pod refers to, or None if it is optional and not there."""
    name = reference.get("name") or reference.get("secretName", "")
    if name not in objects:
        if reference.get("optional"):
            return None
        raise PodError(f"{kind} {name!r} not found")
    found = objects[name]
    if kind == "Secret":
        encoded, plain = found.get("data") or {}, found.get("stringData") or {}
    else:
        encoded, plain = found.get("binaryData") or {}, found.get("data") or {}
    return {key: base64.b64decode(value) for key, value in encoded.items()} | {
        key: value.encode() for key, value in plain.items()
    }


def fill_volume(
    volume: Object,
    directory: Path,
    pod: Object,
    config_maps: Mapping[str, Object],
    secrets: Mapping[str, Object],
    address: str,
) -> Path:
    """Makes one volume of the pod. Returns its directory, which is `directory` unless the volume is a hostPath."""
    if host := volume.get("hostPath"):
        return Path(host["path"])
    directory.mkdir(parents=True, exist_ok=True)
    if "emptyDir" in volume:
        return directory
    sources = volume["projected"].get("sources", []) if "projected" in volume else [volume]
    for source in sources:
        if reference := source.get("configMap"):
            _write_entries(directory, find_object(config_maps, "ConfigMap", reference), reference)
        elif reference := source.get("secret"):
            _write_entries(directory, find_object(secrets, "Secret", reference), reference)
        elif "downwardAPI" not in source:
            kind = next((key for key in source if key != "name"), "?")
            raise PodError(f"volume {volume['name']!r} is a {kind}, which only a cluster has")
        else:
            write_downward(directory, source, pod, address)
    return directory


def write_downward(directory: Path, source: Object, pod: Object, address: str) -> None:
    """Writes the files of a downwardAPI source, each in one step, so that a reader never sees half of one."""
    for item in source["downwardAPI"].get("items", []):
        if "fieldRef" not in item:
            raise PodError(f"volume item {item['path']!r}: only fieldRef is supported locally")
        path = directory / item["path"]
        fresh = path.with_name(f".{path.name}.new")
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(read_field(pod, item["fieldRef"]["fieldPath"], address))
        fresh.replace(path)


def _write_entries(directory: Path, entries: dict[str, bytes] | None, reference: Object) -> None:
    if entries is None:
        return
    items = reference.get("items") or [{"key": key, "path": key} for key in entries]
    for item in items:
        if item["key"] not in entries:
            raise PodError(f"volume source {reference}: key {item['key']!r} not found")
        path = directory / item["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(entries[item["key"]])
