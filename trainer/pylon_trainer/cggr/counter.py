"""The step count that the published modules keep: a buffer of theirs in `state_dict`, read by nobody in a step.

Its value stands in Python as well, because reading a buffer on a device waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class CountingModule(nn.Module):
    """A module with `step()`, to be called after `optimizer.step()`."""

    _count_name = "step_count"

    def __init__(self) -> None:
        super().__init__()
        self._steps = 0
        self._calls = 0
        """Forward passes since the last step, where something is drawn for each."""
        self.register_buffer(self._count_name, torch.zeros((), dtype=torch.int64))
        self.register_load_state_dict_post_hook(_read_count)  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """Count an optimizer step."""
        self._steps += 1
        self._calls = 0
        getattr(self, self._count_name).add_(1)


def _read_count(module: CountingModule, _: Any) -> None:
    module._steps, module._calls = int(getattr(module, module._count_name)), 0
