"""Sums encoded blocks over ranks: what travels, and how many bytes that is.

Two ranks send each other all they have: one all-gather, and each adds up both. More ranks divide the blocks: each
receives its part from all (all-to-all), adds it up in float32 and encodes the sum anew for all (all-gather), so that a
rank's bytes stay below twice its payload however many ranks there are. With two ranks both ways move the same bytes,
and the first encodes once only. Every rank decodes the same bytes in the same order: sums are equal bit for bit.

Shapes: B blocks, V values of a block, P bytes of a block's payload, R ranks, M blocks of one rank's part.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from pylon_trainer.consensus.codecs import Codec
from pylon_trainer.runtime.distributed import World


class Summed(NamedTuple):
    """What became of the ranks' values. Over all ranks, both losses add up to the true sum less the decoded one."""

    sum_BV: Tensor
    """As decoded, equal on all ranks."""
    lost_BV: Tensor
    """What this rank's values lost when they were encoded."""
    lost_again_BV: Tensor | None
    """What the sum lost when it was encoded: zero outside of this rank's part. None where it never was."""

    @property
    def all_lost_BV(self) -> Tensor:
        """Both losses: what error feedback keeps, so that nothing is lost in the end."""
        return self.lost_BV if self.lost_again_BV is None else self.lost_BV + self.lost_again_BV


def sum_encoded(world: World, codec: Codec, values_BV: Tensor, owed_BV: Tensor | None = None) -> Summed:
    """The sum over ranks. Collective.

    values_BV: finite float32. owed_BV: `lost_again_BV` of an earlier sum, to be added to this one.
    """
    own_BP = codec.encode(values_BV)
    if world.size <= 2:
        decoded = [codec.decode(payload_BP) for payload_BP in world.all_gather(own_BP)]
        return Summed(_add_up(decoded), values_BV - decoded[world.rank], None)
    blocks = len(values_BV)
    part = _part_blocks(blocks, world.size)
    payload_RMP = F.pad(own_BP, (0, 0, 0, part * world.size - blocks)).view(world.size, part, -1)
    part_MV = _add_up([codec.decode(payload_MP) for payload_MP in world.all_to_all(payload_RMP)])
    mine = slice(min(world.rank * part, blocks), min((world.rank + 1) * part, blocks))
    mine_MV = part_MV[: mine.stop - mine.start]
    if owed_BV is not None:
        mine_MV += owed_BV[mine]
    part_MP = codec.encode(part_MV)
    sum_BV = codec.decode(world.all_gather(part_MP).flatten(0, 1)[:blocks])
    lost_again_BV = values_BV.new_zeros(values_BV.shape)
    lost_again_BV[mine] = mine_MV - sum_BV[mine]
    return Summed(sum_BV, values_BV - codec.decode(own_BP), lost_again_BV)


def summed_bytes(codec: Codec, blocks: int, ranks: int) -> int:
    """Bytes that sum_encoded sends from each rank, and as many that it receives."""
    if ranks <= 2:
        return blocks * codec.block_bytes * (ranks - 1)
    return 2 * _part_blocks(blocks, ranks) * codec.block_bytes * (ranks - 1)


def _part_blocks(blocks: int, ranks: int) -> int:
    return -(-blocks // ranks)


def _add_up(decoded: list[Tensor]) -> Tensor:
    first, *others = decoded
    total = first.clone()
    for other in others:
        total += other
    return total
