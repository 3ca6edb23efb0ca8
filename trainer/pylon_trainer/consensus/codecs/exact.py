"""Values as they are, in float32, or rounded to bfloat16: nothing is chosen and nothing left out."""

from __future__ import annotations

import torch
from torch import Tensor


class Plain:
    """One value, one number of a floating-point type."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.name = {torch.float32: "Float32", torch.bfloat16: "BFloat16"}[dtype]
        self.block_values = 1
        self.block_bytes = dtype.itemsize

    def encode(self, values_BV: Tensor) -> Tensor:
        """See Codec."""
        return values_BV.to(self._dtype).contiguous().view(torch.uint8)

    def decode(self, payload_BP: Tensor) -> Tensor:
        """See Codec."""
        return payload_BP.contiguous().view(self._dtype).float()


FLOAT32 = Plain(torch.float32)
BFLOAT16 = Plain(torch.bfloat16)
