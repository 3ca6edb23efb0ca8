"""Replay: a step's device work recorded once as a CUDA graph and replayed from then on, so that the host launches one
graph where it launched hundreds of short kernels.

A recording holds for one key: whatever decides which kernels run, the ratio above all. The work must not look at values
on the host, so numbers that change from step to step come to it as tensors. Every key runs once as it is, which
compiles what there is to compile, is recorded the second time, and replayed from then on. The gradients of all
recordings share one set of buffers, which stays. Refuses nothing: work that has no recording yet just runs.

The price: gradients are set to zero and added to, 16 bytes of traffic per parameter and step, and the recordings keep
a pool of memory for intermediate results of their own. It pays where kernels are shorter than their launches.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from pylon_trainer.step import Batch

Result = TypeVar("Result")
Number = float | Tensor
"""A scalar: on the host, or a float64 tensor on the device."""


class Runner(Protocol):
    """Runs the device work of a step."""

    def __call__(self, key: Hashable, work: Callable[..., Result], batch: Batch, *numbers: float) -> Result:
        """work(batch, *numbers), whose result holds tensors, None, tuples and dataclasses of them."""
        ...


def run_at_once(key: Hashable, work: Callable[..., Result], batch: Batch, *numbers: float) -> Result:  # noqa: ARG001
    """The runner that launches every kernel."""
    return work(batch, *numbers)


class Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    batch: Batch
    numbers: Tensor
    result: Any


class Replay:
    """The runner that records. What it returns is a copy, safe from the next replay; the gradients are not: they are
    in the same buffers every time."""

    def __init__(self, parameters: Iterable[Parameter]) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._gradients: list[Tensor] | None = None
        self.recordings: dict[Hashable, Recording | None] = {}
        """None: has run once, and not been recorded yet."""

    def __call__(self, key: Hashable, work: Callable[..., Result], batch: Batch, *numbers: float) -> Result:
        """As Runner has it."""
        adds = self._parameters[0].grad is not None
        key = (key, adds, batch.tokens_BT.shape, batch.documents_BT is None)
        # What adds to gradients outside the buffers, those of work that was not replayed, is not replayed either.
        if key not in self.recordings or (adds and not self._owns_gradients()):
            self.recordings.setdefault(key, None)
            return work(batch, *_on_device(numbers, batch.tokens_BT.device))
        recording = self.recordings[key]
        if recording is None:
            recording = self.recordings[key] = self._record(work, batch, numbers, adds)
        _fill(recording, batch, numbers)
        recording.graph.replay()
        self._install_gradients()
        return cast("Result", _copy(recording.result))

    def _record(self, work: Callable[..., Any], batch: Batch, numbers: tuple[float, ...], adds: bool) -> Recording:
        if self._gradients is None:
            self._gradients = [torch.zeros_like(parameter) for parameter in self._parameters]
        self._install_gradients()
        own, values = _copy(batch), _on_device(numbers, batch.tokens_BT.device)
        graph = torch.cuda.CUDAGraph()
        # Other threads, NCCL's for one, may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=_pool().id, capture_error_mode="thread_local"):
            if not adds:
                torch._foreach_zero_(self._gradients)
            result = work(own, *values)
        return Recording(graph, own, values, result)

    def _install_gradients(self) -> None:
        for parameter, gradient in zip(self._parameters, self._gradients or (), strict=True):
            parameter.grad = gradient

    def _owns_gradients(self) -> bool:
        return self._gradients is not None and self._parameters[0].grad is self._gradients[0]


@functools.cache
def _pool() -> Any:
    """Memory of all recordings of this process. They may share it, as no two run at once and results are copied. Held
    here, because a pool whose last recording is gone cannot be used again."""
    return torch.cuda.MemPool()


def _pinned(numbers: tuple[float, ...]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64).pin_memory()


def _on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    return _pinned(numbers).to(device, non_blocking=True)


def _fill(recording: Recording, batch: Batch, numbers: tuple[float, ...]) -> None:
    recording.numbers.copy_(_pinned(numbers), non_blocking=True)
    for field in dataclasses.fields(Batch):
        own, new = getattr(recording.batch, field.name), getattr(batch, field.name)
        if own is not None:
            own.copy_(new, non_blocking=True)


def _copy(value: Any) -> Any:
    """Tensors anywhere in it cloned."""
    if isinstance(value, Tensor):
        return value.clone()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return dataclasses.replace(value, **{name: _copy(getattr(value, name)) for name in names})
    if isinstance(value, tuple):
        return tuple(_copy(part) for part in value)
    return value
