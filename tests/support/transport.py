"""Counts what a rank hands to torch.distributed, for tests of the trainer's own count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor


def count_bytes(monkeypatch: pytest.MonkeyPatch, size: int) -> Callable[[], int]:
    """Bytes that a rank hands to torch.distributed for its peers, by what each collective sends."""
    counted = 0
    gather, exchange, reduce = dist.all_gather_into_tensor, dist.all_to_all_single, dist.all_reduce

    def patched_gather(output: Tensor, own: Tensor) -> None:
        nonlocal counted
        counted += own.nbytes * (size - 1)
        gather(output, own)

    def patched_exchange(output: Tensor, own: Tensor) -> None:
        nonlocal counted
        counted += sum(part.nbytes for part in own.chunk(size)[1:])
        exchange(output, own)

    def patched_reduce(tensor: Tensor, *more: Any) -> None:
        nonlocal counted
        counted += 2 * tensor.nbytes * (size - 1) // size
        reduce(tensor, *more)

    monkeypatch.setattr(dist, "all_gather_into_tensor", patched_gather)
    monkeypatch.setattr(dist, "all_to_all_single", patched_exchange)
    monkeypatch.setattr(dist, "all_reduce", patched_reduce)
    return lambda: counted
