"""Whether ranks that should be alike are: configuration and first weights at the start, replicas while training.

Replicas take the same update every step, so nothing but a defect, of memory, of a kernel or of ours, lets them
drift apart; unnoticed, each rank then trains a model of its own. What is compared is a hash, computed where the tensors
are; ranks exchange sixteen bytes for each tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pylon_api.run import RunConfig
from pylon_api.training import Disagreement
from pylon_trainer.errors import PeerLost, SharedConfigError
from pylon_trainer.runtime.distributed import World

CHUNK_VALUES = 2**24
"""Values hashed at a time."""
_GOLDEN, _MIX = -0x61C88647, 0x45D9F3B


def refuse_disagreement(world: World, config: RunConfig, weights: Mapping[str, Tensor]) -> None:
    """SharedConfigError, naming ranks and field, when configurations or first weights differ. Collective."""
    written = json.dumps(config.to_wire(), sort_keys=True)
    own = hashlib.sha256(written.encode()).hexdigest(), fingerprints(list(weights.values())).tolist()
    digests, hashes = zip(*world.gather(own), strict=True)
    if others := _minority(digests):
        configs = [json.loads(text) for text in world.gather(written)]
        usual = next(c for rank, c in enumerate(configs) if rank not in others)
        path, had, wanted = _first_difference(configs[others[0]], usual)
        raise SharedConfigError(
            f"{_name(others)} and the others run different configurations: {path} is {had} there and {wanted} "
            f"elsewhere; give all pods the same file"
        )
    if others := _minority([tuple(hash) for hash in hashes]):
        raise SharedConfigError(
            f"{_name(others)} and the others begin with different weights from training.seed {config.training.seed}; "
            f"run the same image on the same kind of machine everywhere"
        )


class Agreement:
    """The replicated tensors of a run, under watch."""

    def __init__(self, world: World, tensors: Mapping[str, Tensor], on_disagreement: Disagreement) -> None:
        """tensors: by name, those that every rank must have alike; they are watched where they are."""
        self._world, self._tensors, self._on_disagreement = world, tensors, on_disagreement

    def check(self) -> str | None:
        """Compare; None when all are alike, else what was healed, for a person. Collective; waits for the device.

        PeerLost when the spec says that a disagreement ends the attempt.
        """
        own = fingerprints(list(self._tensors.values()))
        highest, lowest = self._world.maximum(torch.stack([own, -own])).unbind()
        differs = (highest != -lowest).tolist()
        if not any(differs):
            return None
        ranks = _minority([tuple(hash) for hash in self._world.gather(own.tolist())])
        different = [name for name, is_different in zip(self._tensors, differs, strict=True) if is_different]
        found = f"{_name(ranks)} and the others differed in {len(different)} of {len(differs)} tensors ({different[0]})"
        if self._on_disagreement is Disagreement.STOP:
            raise PeerLost(f"replicas disagree: {found}; the next attempt goes on from the newest checkpoint")
        for name in different:
            self._heal(self._tensors[name])
        return f"replicas disagreed: {found}; all go on with rank 0's"

    def _heal(self, tensor: Tensor) -> None:
        values = tensor.detach().contiguous()
        self._world.broadcast_tensor(values, source=0)
        with torch.no_grad():
            tensor.copy_(values)


def fingerprints(tensors: Sequence[Tensor]) -> Tensor:
    """A hash of each tensor's bits, int64, on the device, without waiting for it.

    The sum of its words, each mixed with its place in a way that can be undone, so that two tensors which differ in one
    word always have different ones: multiplied by odd numbers, the upper half folded onto the lower, like MurmurHash3.
    Sums of integers do not depend on their order.
    """
    return torch.stack([_fingerprint(tensor.detach()) for tensor in tensors])


def _fingerprint(tensor: Tensor) -> Tensor:
    flat = tensor.contiguous().view(-1)
    words = flat.view({1: torch.int8, 2: torch.int16}.get(flat.element_size(), torch.int32))
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(words), CHUNK_VALUES):
        part = words[start : start + CHUNK_VALUES].int()
        part = part + torch.arange(start, start + len(part), dtype=torch.int32, device=tensor.device) * _GOLDEN
        for _ in range(2):
            part ^= part >> 16 & 0xFFFF
            part *= _MIX
        total += part.sum(dtype=torch.int64)
    return total


def _minority(values: Sequence[Any]) -> list[int]:
    """Ranks whose value is not the most frequent one; among equally frequent ones that of the lowest rank counts."""
    usual, _ = Counter(values).most_common(1)[0]
    return [rank for rank, value in enumerate(values) if value != usual]


def _name(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _first_difference(one: Any, other: Any, path: str = "") -> tuple[str, Any, Any]:
    """Where two JSON values differ first, and both values there."""
    if isinstance(one, dict) and isinstance(other, dict):
        key = next(key for key in sorted(one.keys() | other.keys()) if one.get(key) != other.get(key))
        return _first_difference(one.get(key), other.get(key), f"{path}.{key}" if path else key)
    return path, one, other
