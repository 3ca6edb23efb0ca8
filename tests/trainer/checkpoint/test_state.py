from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from pylon_trainer.checkpoint.manifest import placeholders
from pylon_trainer.checkpoint.state import describe, join, place, separate


def state() -> dict[str, Any]:
    return {
        "model": {"embed.weight": torch.arange(6.0).view(2, 3), "norm": torch.ones(2, dtype=torch.bfloat16)},
        "position": {"step": 7, "ratio": 0.5, "lanes": [[1, 2], [3]], "name": None, "done": False},
        "empty": {},
    }


def test_a_state_is_put_together_as_it_was() -> None:
    values, tensors = separate(state())

    joined = join(json.loads(json.dumps(values)), tensors)

    assert torch.equal(joined["model"].pop("embed.weight"), torch.arange(6.0).view(2, 3))
    assert joined["model"].pop("norm").dtype == torch.bfloat16
    assert joined == {"model": {}, "position": state()["position"], "empty": {}}


def test_keys_are_paths_below_the_prefix() -> None:
    _, tensors = separate(state(), "own")

    assert describe(tensors) == {
        "own/model/embed.weight": ("float32", (2, 3)),
        "own/model/norm": ("bfloat16", (2,)),
    }


def test_tensors_are_not_copied_and_carry_no_gradient() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))

    _, tensors = separate({"w": parameter})

    assert tensors["w"].data_ptr() == parameter.data_ptr()
    assert not tensors["w"].requires_grad


def test_placeholders_are_told_their_file() -> None:
    values, _ = separate(state())

    placed = list(placeholders(place(values, {"model/embed.weight": "rank-0", "model/norm": "rank-1"}.__getitem__)))

    assert placed == [
        {"file": "rank-0", "key": "model/embed.weight", "dtype": "float32", "shape": [2, 3]},
        {"file": "rank-1", "key": "model/norm", "dtype": "bfloat16", "shape": [2]},
    ]


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        ({"a": {1: 2}}, "1 in a is no key"),
        ({"a": {"": 2}}, "'' in a is no key"),
        ({"__tensor__": 2}, "'__tensor__' in the root is no key"),
        ({"a": {"b": [1, torch.ones(1)]}}, r"a/b\[1\] is of .*Tensor"),
        ({"a": {"b": {1, 2}}}, "a/b is of .*set"),
        ({"a": {"b": torch.ones(1)}, "a/b": torch.ones(1)}, "two tensors are called a/b"),
    ],
)
def test_what_cannot_be_saved_is_refused_by_its_path(tree: dict[str, Any], told: str) -> None:
    with pytest.raises((TypeError, ValueError), match=told):
        separate(tree)
