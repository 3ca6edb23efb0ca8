"""The exact sum in the gradients' own precision: the same mathematics as DistributedDataParallel, made explicit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from pylon_trainer.runtime.distributed import World

BUCKET_BYTES = 32 * 2**20
"""Gradients are summed in buckets about this large: few enough to hide latency, small enough to cost little memory."""


class ExactExchange:
    """All-reduce in flat buckets, in the order of the names given."""

    smoothed = frozenset[str]()
    replicas: Mapping[str, Tensor] = MappingProxyType({})

    def __init__(self, world: World, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._world = world
        self._bucket_bytes = bucket_bytes

    def exchange(self, named_gradients: Mapping[str, Tensor]) -> None:
        """See Exchange."""
        if self._world.size == 1:
            return
        for bucket in self._buckets(named_gradients.values()):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            self._world.sum(flat)
            parts = flat.split([gradient.numel() for gradient in bucket])
            torch._foreach_copy_(bucket, [p.view_as(g) for p, g in zip(parts, bucket, strict=True)])

    def after_update(self, *, is_last: bool) -> None:
        """Weights are alike."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing is kept."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing was kept."""

    def _buckets(self, gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
        bucket: list[Tensor] = []
        size_bytes = 0
        for gradient in gradients:
            if bucket and (size_bytes + gradient.nbytes > self._bucket_bytes or gradient.dtype != bucket[0].dtype):
                yield bucket
                bucket, size_bytes = [], 0
            bucket.append(gradient)
            size_bytes += gradient.nbytes
        if bucket:
            yield bucket
