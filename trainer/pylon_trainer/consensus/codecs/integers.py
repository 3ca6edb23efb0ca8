"""Small integers with one scale per block: int8 and int4.

Symmetric and rounded to nearest: the largest value of a block sets its scale, zero stays zero. The scale travels as
bfloat16, which has float32's range, and is rounded before it divides, so both sides use the same one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pylon_trainer.consensus.codecs.exact import BFLOAT16


class Int8:
    """-127 to 127 in a byte each."""

    name = "Int8"

    def __init__(self, block_values: int = 256) -> None:
        self.block_values = block_values
        self.block_bytes = block_values + BFLOAT16.block_bytes

    def encode(self, values_BV: Tensor) -> Tensor:
        """See Codec."""
        scale_payload_B2, integers_BV = _quantise(values_BV, 127)
        return torch.cat([scale_payload_B2, integers_BV.to(torch.int8).view(torch.uint8)], dim=1)

    def decode(self, payload_BP: Tensor) -> Tensor:
        """See Codec."""
        scale_B1, integers_BV = _split(payload_BP)
        return integers_BV.contiguous().view(torch.int8).float() * scale_B1


class Int4:
    """-7 to 7, two to a byte: the first half of a block in the low bits, the second in the high ones."""

    name = "Int4"
    block_values = 128
    block_bytes = block_values // 2 + BFLOAT16.block_bytes

    def encode(self, values_BV: Tensor) -> Tensor:
        """See Codec."""
        scale_payload_B2, integers_BV = _quantise(values_BV, 7)
        low, high = (integers_BV + 8).to(torch.uint8).chunk(2, dim=1)
        return torch.cat([scale_payload_B2, low | high << 4], dim=1)

    def decode(self, payload_BP: Tensor) -> Tensor:
        """See Codec."""
        scale_B1, pairs = _split(payload_BP)
        return (torch.cat([pairs & 15, pairs >> 4], dim=1).float() - 8) * scale_B1


def _quantise(values_BV: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """The scales as they travel, and the values in units of them; a block of zeros has scale 0."""
    payload_B2 = BFLOAT16.encode(values_BV.abs().amax(dim=1, keepdim=True) / largest)
    scale_B1 = BFLOAT16.decode(payload_B2)
    integers_BV = torch.where(scale_B1 > 0, values_BV / scale_B1, 0).round_().clamp_(-largest, largest)
    return payload_B2, integers_BV


def _split(payload_BP: Tensor) -> tuple[Tensor, Tensor]:
    width = BFLOAT16.block_bytes
    return BFLOAT16.decode(payload_BP[:, :width]), payload_BP[:, width:]
