"""One group of tensors on its way to the other ranks, with what is kept on this side of it.

A channel takes this rank's flat gradient and gives the sum over ranks of what got through. What did not is kept and
goes with a later gradient. Channels differ in what they keep: `BlockChannel` the values themselves, RowChannel
(rows.py) whole rows, SketchChannel (sketch.py) a sketch of them.

Shapes: N values of the group, B blocks, V values of a block, E steps of a turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pylon_trainer.consensus import KEPT
from pylon_trainer.consensus.codecs import Codec
from pylon_trainer.consensus.reduction import sum_encoded, summed_bytes
from pylon_trainer.runtime.distributed import World


class Channel(Protocol):
    """One way for a group's gradient. All ranks have the same, in the same state but for what a rank keeps."""

    name: str
    """For a person: the codec, its size, how often."""
    bytes_per_step: int
    """Bytes that a rank sends in a step, at most; it receives as many."""
    kept_N: Tensor | None
    """float32: what of this rank's gradients has not been sent yet; None where nothing is kept as values."""
    has_momentum: bool
    """Whether what comes out is gathered over many steps already, so that the optimizer must not smooth it further."""

    def exchange(self, gradient_N: Tensor, is_skipped: Tensor) -> Tensor:
        """The sum over ranks of what got through, float32, equal on all ranks bit for bit. Collective.

        gradient_N: float32, finite. is_skipped: whether no update comes of this step, the same on all ranks; what is
        kept then stays as it was.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What this rank keeps. Not copies."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what state_dict gave."""
        ...


class BlockChannel:
    """Blocks through a codec, every `every`-th of them in a step, in turns.

    What gets lost is added to the next gradient (error feedback, Seide et al. 2014; Karimireddy et al. 2019,
    arXiv 1901.09847). With a decay below 1 it fades as a momentum does: the decoupled momentum of DeMo (Peng et al.
    2024, arXiv 2411.19870).
    """

    def __init__(
        self,
        world: World,
        codec: Codec,
        values: int,
        kept_N: Tensor | None,
        *,
        every: int = 1,
        decay: float = 1.0,
    ) -> None:
        """values: N. kept_N: to begin with; without it nothing is ever kept. every: E. decay: share of what is kept
        that is left a step later."""
        self._world, self._codec, self._values = world, codec, values
        self._every, self._decay = every, decay
        self._blocks = -(-values // (codec.block_values * every))
        self._turn = 0
        self.name = codec.name if every == 1 else f"{codec.name} every {every}"
        self.bytes_per_step = summed_bytes(codec, self._blocks, world.size)
        self.kept_N = kept_N
        self.has_momentum = decay < 1 or every > 1

    def exchange(self, gradient_N: Tensor, is_skipped: Tensor) -> Tensor:
        """See Channel. Values whose turn it is not have sum 0."""
        total_N = gradient_N if self.kept_N is None else torch.add(gradient_N, self.kept_N, alpha=self._decay)
        total_BEV = cut(total_N, self._codec.block_values * self._every).view(self._blocks, self._every, -1)
        turn = self._turn % self._every
        self._turn += 1
        summed = sum_encoded(self._world, self._codec, total_BEV[:, turn].contiguous())
        if self.kept_N is not None:
            total_BEV[:, turn] = summed.all_lost_BV
            self.kept_N = torch.where(is_skipped, self.kept_N, total_BEV.view(-1)[: self._values])
        if self._every == 1:
            return summed.sum_BV.view(-1)[: self._values]
        sum_BEV = torch.zeros_like(total_BEV)
        sum_BEV[:, turn] = summed.sum_BV
        return sum_BEV.view(-1)[: self._values]

    def state_dict(self) -> dict[str, Any]:
        """See Channel."""
        return {"turn": self._turn} | ({} if self.kept_N is None else {KEPT: self.kept_N})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See Channel."""
        self._turn = state["turn"]
        if self.kept_N is not None:
            self.kept_N.copy_(state[KEPT])


def round_trip(codec: Codec, values_N: Tensor) -> Tensor:
    """What a codec makes of these values."""
    return codec.decode(codec.encode(cut(values_N, codec.block_values))).view(-1)[: len(values_N)]


def cut(values_N: Tensor, size: int) -> Tensor:
    """In blocks of this size, the last one filled up with zeros."""
    return F.pad(values_N, (0, -len(values_N) % size)).view(-1, size)
