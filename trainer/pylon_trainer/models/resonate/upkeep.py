"""What adapted models need between steps: ranks grow, and sub-keys that are hardly used are revived.

All ranks do the same at the same steps. The only bytes are the counts of a codebook's use, a number for each atom every
reviveEverySteps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pylon_trainer.consensus import KEPT
from pylon_trainer.models.decoder import Decoder
from pylon_trainer.models.resonate.model import Resonate
from pylon_trainer.runtime.distributed import World


class Upkeep:
    """Of one model; does nothing when nothing of it is adapted."""

    def __init__(self, model: Decoder, world: World, seed: int) -> None:
        """seed: the same on all ranks."""
        self._shared = model.shared if isinstance(model, Resonate) else None
        self._world, self._seed = world, seed

    def end_step(self, step: int) -> bool:
        """After the update of a step, from 1; whether a part of the model has begun anew. Collective when a look at the
        codebook is due."""
        if self._shared is None:
            return False
        ranks = self._shared.ranks
        ranks.grow(step)
        grows = ranks.spec.rank_at(step) > ranks.spec.rank_at(step - 1)
        codebook = self._shared.codebook
        every = 0 if codebook is None else codebook.spec.revive_every_steps
        if codebook is None or not every or step % every:
            return grows
        codebook.revive(self._world.sum(codebook.counts), (self._seed << 32) + step)
        return True

    def state_dict(self) -> dict[str, Any]:
        """What this rank has counted: a copy, because the next step counts on while a checkpoint is written. The rest
        is the model's."""
        codebook = None if self._shared is None else self._shared.codebook
        return {} if codebook is None else {KEPT: codebook.counts.clone()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting from there; {} is the start."""
        if self._shared is not None and self._shared.codebook is not None and KEPT in state:
            self._shared.codebook.counts.copy_(state[KEPT])
