"""What a checkpoint is in bytes: tensors as safetensors, everything else as JSON, a manifest with checksums.

A checkpoint's state is nested dictionaries with string keys; each top-level part becomes one file. Nothing here touches
a store.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import xxhash
from torch import Tensor

MANIFEST = "manifest.json"
COMMITTED = "COMMITTED"
"""The marker: a checkpoint without it, or with another manifest than it names, does not exist."""

_VALUES = "state.json"
_TENSORS = ".safetensors"
_TENSOR_KEY = "__tensor__"
_FORMAT = 1


class DamagedCheckpoint(Exception):
    """What was read is not what was written. Its text names the file."""


def pack(state: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a state: `<part>.safetensors` for each part that holds tensors, and state.json for the rest."""
    tensors: dict[str, dict[str, Tensor]] = {}
    values = {part: _separate(value, "", tensors.setdefault(part, {})) for part, value in state.items()}
    files = {f"{part}{_TENSORS}": safetensors.torch.save(found) for part, found in tensors.items() if found}
    return {**files, _VALUES: _dump(values)}


def unpack(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The state that pack was given, tensors on the CPU. DamagedCheckpoint when the files do not parse."""
    try:
        values = json.loads(files[_VALUES])
        return {
            part: _join(value, safetensors.torch.load(files[name]) if (name := part + _TENSORS) in files else {})
            for part, value in values.items()
        }
    except (KeyError, ValueError, safetensors.SafetensorError) as error:
        raise DamagedCheckpoint(f"its files do not fit together: {error!r}") from error


def _separate(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Mapping):
        return {key: _separate(part, f"{path}/{key}", tensors) for key, part in value.items()}
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {_TENSOR_KEY: path}
    return value


def _join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if _TENSOR_KEY in value:
        return tensors[value[_TENSOR_KEY]]
    return {key: _join(part, tensors) for key, part in value.items()}


@dataclass(frozen=True, slots=True)
class Manifest:
    """Sizes and checksums of a checkpoint's files."""

    step: int
    attempt: int
    files: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, step: int, attempt: int, files: Mapping[str, bytes]) -> Manifest:
        described = {name: {"bytes": len(data), "xxh3_128": checksum(data)} for name, data in files.items()}
        return cls(step, attempt, described)

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        try:
            fields = json.loads(data)
            if fields["format"] != _FORMAT:
                raise DamagedCheckpoint(f"format {fields['format']} is not known to this version")
            return cls(fields["step"], fields["attempt"], fields["files"])
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedCheckpoint(f"{MANIFEST} does not parse") from error

    def dump(self) -> bytes:
        return _dump({"format": _FORMAT, "step": self.step, "attempt": self.attempt, "files": self.files})

    @property
    def size_bytes(self) -> int:
        return sum(file["bytes"] for file in self.files.values())

    def verify(self, name: str, data: bytes) -> None:
        """DamagedCheckpoint when the data is not what was written."""
        expected = self.files[name]
        if len(data) != expected["bytes"]:
            raise DamagedCheckpoint(f"{name} has {len(data)} bytes instead of {expected['bytes']}")
        if checksum(data) != expected["xxh3_128"]:
            raise DamagedCheckpoint(f"checksum of {name} differs")


def checksum(data: bytes) -> str:
    """XXH3, 128 bits: it finds damage at memory speed; it is no defence against an attacker."""
    return str(xxhash.xxh3_128_hexdigest(data))


def _dump(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()
