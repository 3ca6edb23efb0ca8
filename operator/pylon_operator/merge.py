"""Strategic merge of a partial pod template over a generated one, as the API server merges a strategic patch.

Maps merge key by key and null removes a key. Lists that Kubernetes keys merge item by item; all other lists (command,
args, tolerations, envFrom, ...) are replaced as a whole, which is what the API server does too.
`$patch: delete` removes a keyed item, `$patch: replace` replaces a map or keyed item. Anything else that starts with
`$` is refused: those directives are written by tools, not by people.

Keys: `patchMergeKey` of k8s.io/api/core/v1 types.go, with protocol beside containerPort as server-side apply has it.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from pylon_operator.errors import TemplateError

MERGE_KEYS: dict[str, tuple[str, ...]] = {
    "containers": ("name",),
    "initContainers": ("name",),
    "ephemeralContainers": ("name",),
    "volumes": ("name",),
    "imagePullSecrets": ("name",),
    "resourceClaims": ("name",),
    "schedulingGates": ("name",),
    "hostAliases": ("ip",),
    "topologySpreadConstraints": ("topologyKey",),
    "env": ("name",),
    "ports": ("containerPort", "protocol"),
    "volumeMounts": ("mountPath",),
    "volumeDevices": ("devicePath",),
}
KEY_DEFAULTS = {"protocol": "TCP"}
RETAIN_KEYS = frozenset({"volumes", "resourceClaims"})
"""patchStrategy retainKeys: an item is a union, so members that the patch does not name go."""

Object = dict[str, Any]
Key = tuple[Any, ...]


def merge_template(base: Object, patch: Object) -> Object:
    """`base` with `patch` merged over it; neither is changed. Raises TemplateError naming the field."""
    return _merge_map(base, patch, "spec.template")


def _merge_map(base: Object, patch: Object, path: str) -> Object:
    if patch.get("$patch") == "replace":
        return {key: value for key, value in patch.items() if key != "$patch"}
    merged = dict(base)
    for key, value in patch.items():
        field = f"{path}.{key}"
        if key.startswith("$"):
            raise TemplateError(f"{field}: only `$patch: replace`, or `delete` in a keyed list, is understood here")
        if value is None:
            merged.pop(key, None)
        elif key in MERGE_KEYS:
            merged[key] = _merge_list(key, _expect(base.get(key) or [], list, field), value, field)
        elif isinstance(base.get(key), dict):
            merged[key] = _merge_map(base[key], _expect(value, dict, field), field)
        elif isinstance(value, dict):
            merged[key] = _merge_map({}, value, field)
        else:
            merged[key] = value
    return merged


def _merge_list(name: str, base: list[Object], patch: Any, path: str) -> list[Object]:
    merged = {_key(name, item, f"{path}[{i}]"): item for i, item in enumerate(base)}
    rank = {key: i for i, key in enumerate(merged)}
    patched = []
    for i, item in enumerate(_expect(patch, list, path)):
        where = f"{path}[{i}]"
        key = _key(name, _expect(item, dict, where), where)
        if item.get("$patch") == "delete":
            merged.pop(key, None)
        else:
            old = merged.get(key, {})
            if name in RETAIN_KEYS:
                old = {member: value for member, value in old.items() if member in item}
            merged[key] = _merge_map(old, item, where)
            patched.append(key)
    return [merged[key] for key in _order(list(merged), patched, rank)]


def _order(keys: list[Key], patched: list[Key], rank: dict[Key, int]) -> list[Key]:
    """The server's order: patched items as the patch has them, each after the untouched ones that stood before it.

    So new items come as early as the patch allows (mergeSortedSlice in apimachinery's strategicpatch/patch.go).
    """
    untouched = deque(key for key in keys if key not in patched)
    ordered = []
    for key in patched:
        while untouched and key in rank and rank[untouched[0]] < rank[key]:
            ordered.append(untouched.popleft())
        ordered.append(key)
    return [*ordered, *untouched]


def _key(name: str, item: Object, path: str) -> Key:
    values = tuple(item.get(part, KEY_DEFAULTS.get(part)) for part in MERGE_KEYS[name])
    if None in values:
        missing = MERGE_KEYS[name][values.index(None)]
        raise TemplateError(f"{path}.{missing}: required, because items of {name} are merged by it")
    return values


def _expect(value: Any, kind: type, path: str) -> Any:
    if not isinstance(value, kind):
        wanted = "a list" if kind is list else "an object"
        raise TemplateError(f"{path}: should be {wanted} (got {value!r})")
    return value
