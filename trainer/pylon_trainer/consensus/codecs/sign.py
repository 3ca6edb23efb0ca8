"""One bit for each value and a mean magnitude for each block: scaled signs (Karimireddy et al. 2019, arXiv 1901.09847).

Whatever is below the mean in size becomes too large and whatever is above it too small: a third of normal values'
energy is lost. The caller must keep that and let it come again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pylon_trainer.consensus.codecs.exact import BFLOAT16


class Sign:
    """Plus or minus the block's mean magnitude, eight values to a byte, the first in the lowest bit."""

    name = "Sign"
    block_values = 256
    block_bytes = block_values // 8 + BFLOAT16.block_bytes

    def encode(self, values_BV: Tensor) -> Tensor:
        """See Codec."""
        mean_payload_B2 = BFLOAT16.encode(values_BV.abs().mean(dim=1, keepdim=True))
        bits_BP8 = (values_BV >= 0).to(torch.uint8).view(len(values_BV), -1, 8) << _places(values_BV.device)
        return torch.cat([mean_payload_B2, bits_BP8.sum(dim=2, dtype=torch.uint8)], dim=1)

    def decode(self, payload_BP: Tensor) -> Tensor:
        """See Codec."""
        width = BFLOAT16.block_bytes
        bits_BP8 = payload_BP[:, width:, None] >> _places(payload_BP.device) & 1
        return (bits_BP8.flatten(1).float() * 2 - 1) * BFLOAT16.decode(payload_BP[:, :width])


def _places(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
