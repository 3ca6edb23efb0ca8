from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from pylon_trainer.checkpoint.manifest import placeholders
from pylon_trainer.checkpoint.share import Divider
from pylon_trainer.checkpoint.state import describe, join, separate


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


def test_the_placeholders_of_a_state_are_made_once() -> None:
    divider, tree = Divider(0, 2), state()

    first, second = (divider.share(tree, {"rng": torch.zeros(5)}) for _ in range(2))
    tree["model"]["norm"] = torch.ones(4)
    third = divider.share(tree, {"rng": torch.zeros(5)})

    assert list(placeholders(first.replicated)) == [
        {"file": "rank-00000.safetensors", "key": "model/embed.weight", "dtype": "float32", "shape": [2, 3]},
        {"file": "rank-00001.safetensors", "key": "model/norm", "dtype": "bfloat16", "shape": [2]},
    ]
    assert second.replicated == first.replicated
    assert second.replicated["model"]["norm"] is first.replicated["model"]["norm"]
    assert third.replicated["model"]["norm"]["__tensor__"]["shape"] == [4]


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
