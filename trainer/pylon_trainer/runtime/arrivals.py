"""Arrivals: figures on their way from the device to the host, to be read when they have long been there.

Whoever reads them later, at a step that all ranks agree on, never waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Arrival(NamedTuple):
    """One vector under way."""

    figures: Tensor
    """On the device."""
    host: Tensor
    event: torch.cuda.Event | None

    @classmethod
    def of(cls, figures: Tensor) -> Arrival:
        """Set off for pinned memory."""
        host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=figures.is_cuda)
        host.copy_(figures, non_blocking=True)
        event = None
        if figures.is_cuda:
            event = torch.cuda.Event()
            event.record()
        return cls(figures, host, event)

    def wait(self) -> list[float]:
        """The figures, integers as integers."""
        if self.event is not None:
            self.event.synchronize()
        arrived: list[float] = self.host.tolist()
        return arrived
