"""How values become bytes: each codec is a pure pair of encode and decode, with no state and no ranks.

Values come in blocks, and every block becomes equally many bytes, so that a payload can be cut between ranks at any
block and its size is known before anything is measured. What decoding loses is for the caller to keep (channel.py).

Shapes: B blocks, V values of a block, P bytes of a block's payload.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Codec(Protocol):
    """One way to write blocks of float32 values as bytes."""

    @property
    def name(self) -> str:
        """For a person, with its size: `Int8`, `Dct/64`."""
        ...

    @property
    def block_values(self) -> int:
        """V: values of a block."""
        ...

    @property
    def block_bytes(self) -> int:
        """P: bytes of a block's payload."""
        ...

    def encode(self, values_BV: Tensor) -> Tensor:
        """uint8 payload B x P of finite float32 values. Blocks are independent of each other."""
        ...

    def decode(self, payload_BP: Tensor) -> Tensor:
        """float32 values B x V of a payload; the same bits wherever the same bytes are decoded by the same device."""
        ...
