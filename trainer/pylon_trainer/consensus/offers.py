"""The channels that a group of tensors could have, by what the spec asks for: ladders from many bytes to few.

What a codec would lose is measured on this rank's own values, without a word to the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from pylon_api.training import ConsensusCodec, ConsensusSpec
from pylon_trainer.consensus.channel import BlockChannel, Channel, round_trip
from pylon_trainer.consensus.codecs import Codec
from pylon_trainer.consensus.codecs.dct import GROUPS, Dct
from pylon_trainer.consensus.codecs.exact import BFLOAT16, FLOAT32
from pylon_trainer.consensus.codecs.integers import Int4, Int8
from pylon_trainer.consensus.codecs.sign import Sign
from pylon_trainer.consensus.groups import Group, Kind
from pylon_trainer.consensus.rows import RowChannel, largest_rows
from pylon_trainer.consensus.sketch import Sketch, SketchChannel
from pylon_trainer.runtime.distributed import World

DCT_DECAY = 0.999
"""Of the momentum, as in DeMo."""
TURNS = (1, 2, 4, 8, 16)
"""Steps that an exchange is stretched over, as multiples of everySteps, where nothing else fits."""
ROW_SHARES = tuple(2**power for power in range(8))
SKETCH_SHARES = tuple(4**power for power in range(1, 6))
"""Rows of a group to one that is named; values to one bucket of a hash."""


@dataclass(frozen=True)
class Offer:
    """One channel that a group could have."""

    build: Callable[[Tensor | None], Channel]
    """From what has been kept so far; None where nothing is to be kept."""
    decoded: Callable[[Tensor], Tensor]
    """What would get through of this rank's values N if all had their turn; the same object for offers that differ in
    turns alone."""
    every: int = 1
    """Steps of a turn."""

    @functools.cached_property
    def channel(self) -> Channel:
        """An example, for its name and bytes."""
        return self.build(None)


@dataclass(frozen=True)
class Catalogue:
    """What there is to offer in this world."""

    world: World
    spec: ConsensusSpec
    seed: int

    def offers(self, group: Group) -> list[Offer]:
        """Channels for a group, by what the spec asks for.

        All of one list keep as much, so that checkpoints have one size; a sketch therefore has to be asked for.
        """
        if group.kind is Kind.VECTORS:
            return [offer for codec in (FLOAT32, BFLOAT16, Int8()) for offer in self._blocks(group, codec)]
        match self.spec.codec:
            case ConsensusCodec.INT8:
                return [*self._integers(group, Int8())]
            case ConsensusCodec.INT4:
                return [*self._integers(group, Int4())]
            case ConsensusCodec.SIGN:
                return [*self._integers(group, Sign())]
            case ConsensusCodec.DCT:
                return [*self._dct(group)]
            case ConsensusCodec.SKETCH:
                return [*self._sketches(group)]
            case ConsensusCodec.SPARSE_ROWS:
                return [*self._rows(group)] or [*self._dct(group)]
            case _:
                return [
                    *self._blocks(group, BFLOAT16),
                    *self._integers(group, Int8()),
                    *self._integers(group, Int4()),
                    *self._dct(group),
                    *self._rows(group),
                ]

    def _integers(self, group: Group, codec: Codec) -> Iterator[Offer]:
        return self._blocks(group, codec, [self.spec.every_steps])

    def _blocks(self, group: Group, codec: Codec, turns: Sequence[int] = (1,), decay: float = 1.0) -> Iterator[Offer]:
        decoded = functools.partial(round_trip, codec)
        for every in turns:
            build = functools.partial(BlockChannel, self.world, codec, group.values, every=every, decay=decay)
            yield Offer(build, decoded, every)

    def _dct(self, group: Group) -> Iterator[Offer]:
        for size in GROUPS:
            yield from self._blocks(group, Dct(size), [self.spec.every_steps * turns for turns in TURNS], DCT_DECAY)

    def _sketches(self, group: Group) -> Iterator[Offer]:
        for share in SKETCH_SHARES:
            if width := group.values // share:
                sketch = Sketch(group.values, width, self.seed, self.world.device)
                yield Offer(functools.partial(_build_sketch, self.world, sketch), sketch.round_trip)

    def _rows(self, group: Group) -> Iterator[Offer]:
        width = group.row_width
        if group.kind is Kind.MATRICES or width is None:
            return
        rows = group.values // width
        for limit in sorted({-(-rows // share) for share in ROW_SHARES}, reverse=True):
            build = functools.partial(RowChannel, self.world, rows, width, limit)
            yield Offer(build, functools.partial(largest_rows, width, limit))


def _build_sketch(world: World, sketch: Sketch, _kept_N: Tensor | None) -> SketchChannel:
    return SketchChannel(world, sketch)
