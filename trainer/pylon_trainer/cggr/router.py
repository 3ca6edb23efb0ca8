"""Truncated router: the lowest blocks of a model under its own head, as a cheap judge of what is hard.

It is made of the model's own parts and holds them without owning them, so a module that keeps a router gains no
parameters and no keys in its `state_dict`. Only Hugging Face models of the supported families have one; others raise
ConfigError, as a whole model for a router would cost more than it spares.

Shapes: B sequences, T tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pylon_trainer.errors import ConfigError
from pylon_trainer.huggingface.request import read
from pylon_trainer.huggingface.trunk import HuggingFaceTrunk


class TruncatedRouter(nn.Module):
    """Called like the model, it gives logits B x T x V of the hidden states after `num_layers` blocks."""

    def __init__(self, model: Any, num_layers: int = 2) -> None:
        super().__init__()
        # In a tuple, where torch does not look for modules.
        self._shared = (HuggingFaceTrunk(model),)
        layers = len(self._trunk.blocks)
        if not 1 <= num_layers <= layers:
            raise ConfigError(f"num_layers: {num_layers} of a model with {layers} layers; choose 1 to {layers}")
        self.num_layers = num_layers

    def forward(self, input_ids: Tensor, **arguments: Any) -> Tensor:
        """Logits B x T x V. arguments: attention_mask and position_ids, as the model takes them."""
        return self.hidden(input_ids, **arguments) @ self.head_weight.T

    def hidden(self, input_ids: Tensor, **arguments: Any) -> Tensor:
        """Hidden states B x T x D after the truncated model's last norm."""
        trunk = self._trunk
        request = read({"input_ids": input_ids, **arguments}, trunk.window)
        trunk.place(request.positions_BT, request.starts_BT)
        context = trunk.context(input_ids, None)
        x_BTD = trunk.embed(input_ids, context.places)
        for block in trunk.blocks[: self.num_layers]:
            x_BTD = block(x_BTD, context)
        return trunk.norm(x_BTD)

    @property
    def head_weight(self) -> Tensor:
        """V x D, the model's."""
        return self._trunk.head_weight

    @property
    def _trunk(self) -> HuggingFaceTrunk:
        return self._shared[0]


def create_truncated_router(model: Any, num_layers: int = 2) -> TruncatedRouter:
    """A router of the model's lowest blocks. Raises ConfigError for a model class that is not supported."""
    return TruncatedRouter(model, num_layers)
