"""Takes a state apart into tensors and JSON values, and puts it together again.

A state is nested dictionaries with string keys; its leaves are tensors or JSON values. A tensor's key is its path,
joined by "/". What a state means is not known here; nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pylon_trainer.checkpoint.manifest import TENSOR

Tree = dict[str, Any]


def separate(tree: Mapping[str, Any], prefix: str = "") -> tuple[Tree, dict[str, Tensor]]:
    """The tree with a placeholder for each tensor, and the tensors themselves by key (not copies, detached).

    prefix: put before every key, as in "own/rng/cpu". The placeholder is {"__tensor__": {"key", "dtype", "shape"}}.
    TypeError or ValueError, naming the path, for what cannot be saved.
    """
    tensors: dict[str, Tensor] = {}
    values: Tree = _separate(tree, prefix, tensors)
    return values, tensors


def describe(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Each tensor's dtype (torch's name, "float32") and shape, as a layout wants them."""
    return {key: (_name(tensor.dtype), tuple(tensor.shape)) for key, tensor in tensors.items()}


def place(values: Any, file_of: Callable[[str], str]) -> Any:
    """The tree with the file of every tensor added to its placeholder."""
    if not isinstance(values, dict):
        return values
    if TENSOR in values:
        return {TENSOR: {"file": file_of(values[TENSOR]["key"]), **values[TENSOR]}}
    return {key: place(value, file_of) for key, value in values.items()}


def join(values: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that was taken apart. KeyError with the key of a tensor that is not there."""
    if not isinstance(values, dict):
        return values
    if TENSOR in values:
        return tensors[values[TENSOR]["key"]]
    return {key: join(value, tensors) for key, value in values.items()}


def _separate(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if path in tensors:
            raise ValueError(f"state: two tensors are called {path}")
        tensors[path] = value.detach()
        return {TENSOR: {"key": path, "dtype": _name(value.dtype), "shape": list(value.shape)}}
    if isinstance(value, Mapping):
        return {key: _separate(part, _join_path(path, key), tensors) for key, part in value.items()}
    _check_json(value, path)
    return value


def _check_json(value: Any, path: str) -> None:
    if isinstance(value, list | tuple):
        for number, part in enumerate(value):
            _check_json(part, f"{path}[{number}]")
    elif isinstance(value, Mapping):
        for key, part in value.items():
            _check_json(part, _join_path(path, key))
    elif not isinstance(value, str | int | float | bool | None):
        raise TypeError(f"state: {path} is of {type(value)}; a leaf is a JSON value or a tensor outside of lists")


def _join_path(path: str, key: object) -> str:
    if not isinstance(key, str) or key == TENSOR or key == "":
        raise TypeError(
            f"state: {key!r} in {path or 'the root'} is no key: it must be a string, not empty, not {TENSOR}"
        )
    return f"{path}/{key}" if path else key


@cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
