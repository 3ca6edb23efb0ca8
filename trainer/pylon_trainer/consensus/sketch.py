"""A count-sketch of the gradient with momentum and error feedback inside it: FetchSGD (Rothchild et al. 2020,
arXiv 2007.07682).

Sketches add up: the sum of all ranks' sketches is the sketch of the sum, whatever the number of ranks, so it alone
travels (bfloat16, summed in float32). Every rank then holds the same sketch and finds the same largest values in it.

The vector is laid out in rows as wide as the table. Each hash turns every row by a drawn number of places, gives it a
drawn sign and adds the rows up: values of one row never meet, two of different rows meet in one bucket with
probability 1 / width, as in Charikar et al. 2002, and no scattered addition is needed, whose order a GPU does not fix.

A table much narrower than the vector finds values that are not there, several in one bucket; taking all of them out
would leave more behind than there was, and from step to step without bound. So a step takes that share of what it found
which leaves the least in the table: never more than was in it.

Shapes: N values, H hashes, R rows of the layout, W buckets, C rows worked on at a time, K values recovered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pylon_trainer.consensus.codecs.exact import BFLOAT16
from pylon_trainer.consensus.reduction import sum_encoded, summed_bytes
from pylon_trainer.runtime.distributed import World

HASHES = 3
MOMENTUM = 0.9
RECOVERED_SHARE = 1 / 8
"""Values recovered in a step, as a share of the buckets of a hash."""
CHUNK_VALUES = 2**22
"""Values worked on at a time: the index of a chunk takes eight bytes for each."""


class Sketch:
    """The hashes of one table. Pure; the same seed gives the same ones on every rank."""

    def __init__(self, values: int, width: int, seed: int, device: torch.device) -> None:
        """values: N. width: W, at most values."""
        self._values, self._width = values, width
        self.shape_HW = HASHES, width
        self._rows = -(-values // width)
        draw = torch.Generator().manual_seed(seed)
        self._places_W = torch.arange(width, device=device)
        self._turns_HR = torch.randint(width, (HASHES, self._rows), generator=draw).to(device)
        self._signs_HR = (torch.randint(2, (HASHES, self._rows), generator=draw) * 2.0 - 1).to(device)

    def encode(self, values_N: Tensor) -> Tensor:
        """The table H x W."""
        values_RW = F.pad(values_N, (0, self._rows * self._width - self._values)).view(self._rows, self._width)
        table_HW = values_N.new_zeros(HASHES, self._width)
        for rows in self._chunks():
            for hash in range(HASHES):
                bucket_CW = (self._places_W - self._turns_HR[hash, rows, None]) % self._width
                signed_CW = values_RW[rows].gather(1, bucket_CW) * self._signs_HR[hash, rows, None]
                table_HW[hash] += signed_CW.sum(0)
        return table_HW

    def decode(self, table_HW: Tensor) -> Tensor:
        """An estimate of every value: the median of what the hashes say."""
        parts = []
        for rows in self._chunks():
            bucket_HCW = (self._places_W + self._turns_HR[:, rows, None]) % self._width
            said_HCW = table_HW[:, None].expand(bucket_HCW.shape).gather(2, bucket_HCW)
            said_HCW = said_HCW * self._signs_HR[:, rows, None]
            parts.append(said_HCW.sort(dim=0).values[HASHES // 2])  # torch.median fixes no order on a GPU
        return torch.cat(parts).view(-1)[: self._values]

    def recover(self, table_HW: Tensor) -> Tensor:
        """The largest of all values, as estimated; the others 0."""
        estimate_N = self.decode(table_HW)
        place_K = estimate_N.abs().topk(max(1, int(self._width * RECOVERED_SHARE))).indices
        return torch.zeros_like(estimate_N).scatter_(0, place_K, estimate_N[place_K])

    def round_trip(self, values_N: Tensor) -> Tensor:
        """What a table of these values alone gives back."""
        return self.recover(self.encode(values_N))

    def _chunks(self) -> Iterator[slice]:
        size = max(1, CHUNK_VALUES // (HASHES * self._width))
        return (slice(start, start + size) for start in range(0, self._rows, size))


class SketchChannel:
    """Sketches of gradients; the largest values of what has gathered in them come out."""

    def __init__(self, world: World, sketch: Sketch) -> None:
        self._world, self._sketch = world, sketch
        hashes, width = sketch.shape_HW
        self.name = f"Sketch {hashes} x {width}"
        self.bytes_per_step = summed_bytes(BFLOAT16, hashes * width, world.size)
        self.kept_N: Tensor | None = None
        self.has_momentum = True
        nothing = torch.zeros((), device=world.device)
        self._momentum_HW = self._error_HW = nothing.expand(sketch.shape_HW)  # takes no memory before it is used

    def exchange(self, gradient_N: Tensor, is_skipped: Tensor) -> Tensor:
        """See Channel. Values that were not recovered have sum 0."""
        own_HW = self._sketch.encode(gradient_N)
        sum_HW = sum_encoded(self._world, BFLOAT16, own_HW.view(-1, 1)).sum_BV.view_as(own_HW)
        momentum_HW = MOMENTUM * self._momentum_HW + (1 - MOMENTUM) * sum_HW
        error_HW = self._error_HW + momentum_HW
        update_N = self._sketch.recover(error_HW)
        taken_HW = self._sketch.encode(update_N)
        share = _projection(error_HW, taken_HW)
        error_HW -= share * taken_HW
        self._momentum_HW = torch.where(is_skipped, self._momentum_HW, momentum_HW)
        self._error_HW = torch.where(is_skipped, self._error_HW, error_HW)
        return share * update_N

    def state_dict(self) -> dict[str, Any]:
        """See Channel. Equal on all ranks."""
        return {"momentum": self._momentum_HW.contiguous(), "error": self._error_HW.contiguous()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See Channel."""
        device = self._world.device
        self._momentum_HW, self._error_HW = state["momentum"].to(device), state["error"].to(device)


def _projection(of_HW: Tensor, on_HW: Tensor) -> Tensor:
    """The multiple of one table that comes nearest to another, from 0 to 1."""
    norm = (on_HW * on_HW).sum()
    return torch.where(norm > 0, (of_HW * on_HW).sum() / norm, 0).clamp(0, 1)
