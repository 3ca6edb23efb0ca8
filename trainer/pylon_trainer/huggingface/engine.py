"""The engine of one Hugging Face model: built when it is first needed, and again when the model's ways change.

A trainer switches autocast and activation checkpointing on by itself and at any time, so both are read at every call:
products run in the precision that is in force, and rows are recomputed instead of kept where the model checkpoints or
where a foreign kernel may write over what is kept, as Liger's rotation does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from pylon_api.training import GatingEngine, GatingSpec, RowActivations
from pylon_trainer.errors import ConfigError
from pylon_trainer.gating.ends import Back
from pylon_trainer.gating.engine import Engine, build_engine
from pylon_trainer.huggingface.request import Request
from pylon_trainer.huggingface.trunk import HuggingFaceTrunk


class ModelEngine:
    """Forward passes of a model that can be gone back over from chosen rows."""

    def __init__(self, model: Any, gating: GatingSpec) -> None:
        self.trunk = HuggingFaceTrunk(model)
        self.precision: torch.dtype | None = None
        """Of the products of the last forward pass; None: that of the weights."""
        self._device = model.device.type
        self._gating = gating
        self._engines: dict[bool, Engine] = {}

    def forward(self, request: Request) -> tuple[Tensor, Back]:
        """As an engine's."""
        device = request.batch.tokens_BT.device.type
        self._device = device
        self.precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self.trunk.place(request.positions_BT, request.starts_BT)
        return self._engine().forward(request.batch)

    def trainable(self) -> list[Parameter]:
        """All that may receive gradients."""
        return [parameter for parameter in self.trunk.parameters() if parameter.requires_grad]

    def _engine(self) -> Engine:
        is_checkpointing = self.trunk.is_checkpointing
        if is_checkpointing and self._gating.engine is GatingEngine.HEAD_ONLY:
            raise ConfigError(
                "engine: HeadOnly holds all activations; use SinglePass, or switch gradient_checkpointing off"
            )
        recomputes = is_checkpointing or self.trunk.may_overwrite
        if recomputes not in self._engines:
            changes = {"row_activations": RowActivations.RECOMPUTE} if recomputes else {}
            gating = self._gating.model_copy(update=changes)
            self._engines[recomputes] = build_engine(self.trunk, gating, self._autocast, compile_backend=None)
        return self._engines[recomputes]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self._device, dtype=self.precision, enabled=self.precision is not None, cache_enabled=False
        )
