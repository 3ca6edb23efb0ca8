"""Truncated router: the lowest blocks of a model under its own head, as a cheap judge of what is hard.

It is made of the model's own parts and holds them without owning them, so a module that keeps a router gains no
parameters and no keys in its `state_dict`. Only Hugging Face models of the supported families have one; others raise
ConfigError, as a whole model for a router would cost more than it spares.

Shapes: B sequences, T tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from pylon_trainer.errors import ConfigError
from pylon_trainer.huggingface.families import family_of, layers_of


class TruncatedRouter(nn.Module):
    """Called like the model, it gives logits B x T x V of the hidden states after `num_layers` blocks."""

    def __init__(self, model: Any, num_layers: int = 2) -> None:
        super().__init__()
        family = family_of(model)
        layers = layers_of(model, family)
        if not 1 <= num_layers <= len(layers):
            raise ConfigError(
                f"num_layers: {num_layers} of a model with {len(layers)} layers; choose 1 to {len(layers)}"
            )
        self.num_layers = num_layers
        self._place = family.layers
        # In a tuple, where torch does not look for modules.
        self._shared = model, getattr(model, family.body), nn.ModuleList(layers[:num_layers])

    def forward(self, input_ids: Tensor, **arguments: Any) -> Tensor:
        """Logits B x T x V. arguments: what the model takes."""
        return self.hidden(input_ids, **arguments) @ self.head_weight.T

    def hidden(self, input_ids: Tensor, **arguments: Any) -> Tensor:
        """Hidden states B x T x D after the truncated model's last norm."""
        _, body, _ = self._shared
        with self._truncated():
            hidden_BTD: Tensor = body(input_ids, **{**arguments, "use_cache": False}).last_hidden_state
        return hidden_BTD

    @property
    def head_weight(self) -> Tensor:
        """V x D, the model's."""
        weight: Tensor = self._shared[0].get_output_embeddings().weight
        return weight

    @contextmanager
    def _truncated(self) -> Iterator[None]:
        """The model's body walks over the lowest layers alone, with its own masks and positions."""
        _, body, lowest = self._shared
        modules = vars(body)["_modules"]
        whole = modules[self._place]
        modules[self._place] = lowest
        try:
            yield
        finally:
            modules[self._place] = whole


def create_truncated_router(model: Any, num_layers: int = 2) -> TruncatedRouter:
    """A router of the model's lowest blocks. Raises ConfigError for a model class that is not supported."""
    return TruncatedRouter(model, num_layers)
