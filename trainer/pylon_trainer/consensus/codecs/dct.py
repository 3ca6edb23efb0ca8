"""The largest coefficients of a chunked discrete cosine transform, a byte each, as in DeMo (Peng et al. 2024,
arXiv 2411.19870).

A chunk is 64 x 64 values, transformed along both sides. Its coefficients are dealt out into groups of `group`, and the
largest of each group is kept: of 4096 coefficients 4096 / group. DeMo takes the largest of the whole chunk, which needs
a sort and 12 bits to say where; one per group needs neither, and a byte then holds place, sign and magnitude:

| group | bits of place | magnitudes, in means | bytes per value |
|---|---|---|---|
| 16 | 4 | 1/4 to 32 | 0.063 |
| 32 | 5 | 1/2 to 4 | 0.032 |
| 64 | 6 | 1 and 2 | 0.016 |
| 128 | 7 | 1 | 0.008 |

Magnitudes are powers of two times the mean of the chunk's kept ones, because a few are far larger than the rest. What
is left out, in place or in magnitude, must be kept by the caller and come again: DeMo's momentum.

Shapes: B chunks, V = 4096 values of a chunk, G coefficients of a group, K = V / G groups, S = 64.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from pylon_trainer.consensus.codecs.exact import BFLOAT16

SIDE = 64
GROUPS = (16, 32, 64, 128)


class Dct:
    """One coefficient of every `group`."""

    def __init__(self, group: int) -> None:
        self.name = f"Dct/{group}"
        self.block_values = SIDE * SIDE
        self.block_bytes = self.block_values // group + BFLOAT16.block_bytes
        self._group = group
        self._magnitude_bits = 8 - group.bit_length()
        self._magnitudes = 1 << self._magnitude_bits
        self._lowest_exponent = -(self._magnitudes // 4)

    def encode(self, values_BV: Tensor) -> Tensor:
        """See Codec."""
        basis_SS = _basis(values_BV.device)
        coefficients_BSS = basis_SS @ values_BV.view(-1, SIDE, SIDE) @ basis_SS.T
        # Neighbours go to different groups, so that low frequencies, which are large, do not compete in one.
        coefficients_BGK = coefficients_BSS.view(len(values_BV), self._group, -1)
        place_B1K = coefficients_BGK.abs().argmax(dim=1, keepdim=True)
        kept_BK = coefficients_BGK.gather(1, place_B1K).squeeze(1)
        mean_payload_B2 = BFLOAT16.encode(kept_BK.abs().mean(dim=1, keepdim=True))
        mean_B1 = BFLOAT16.decode(mean_payload_B2)
        exponent_BK = torch.where(mean_B1 > 0, kept_BK.abs() / mean_B1, 1).log2_().round_() - self._lowest_exponent
        magnitude_BK = exponent_BK.clamp_(0, self._magnitudes - 1).to(torch.uint8)
        sign_BK = (kept_BK < 0).to(torch.uint8)
        place_BK = place_B1K.squeeze(1).to(torch.uint8)
        code_BK = (place_BK << 1 | sign_BK) << self._magnitude_bits | magnitude_BK
        return torch.cat([mean_payload_B2, code_BK], dim=1)

    def decode(self, payload_BP: Tensor) -> Tensor:
        """See Codec."""
        width = BFLOAT16.block_bytes
        mean_B1, code_BK = BFLOAT16.decode(payload_BP[:, :width]), payload_BP[:, width:]
        magnitude_BK = torch.exp2((code_BK & (self._magnitudes - 1)).float() + self._lowest_exponent) * mean_B1
        sign_BK = 1 - 2 * (code_BK >> self._magnitude_bits & 1).float()
        place_B1K = (code_BK >> (self._magnitude_bits + 1)).unsqueeze(1)
        places_G1 = torch.arange(self._group, dtype=torch.uint8, device=payload_BP.device).unsqueeze(1)
        coefficients_BGK = torch.where(place_B1K == places_G1, (sign_BK * magnitude_BK).unsqueeze(1), 0)
        basis_SS = _basis(payload_BP.device)
        values_BSS: Tensor = basis_SS.T @ coefficients_BGK.view(-1, SIDE, SIDE) @ basis_SS
        return values_BSS.view(len(code_BK), -1)


@functools.cache
def _basis(device: torch.device) -> Tensor:
    """The orthonormal DCT-II, frequency x place: values are its transpose times coefficients."""
    places_S = torch.arange(SIDE, dtype=torch.float64)
    basis_SS = torch.cos(math.pi / SIDE * (places_S + 0.5) * places_S[:, None]) * math.sqrt(2 / SIDE)
    basis_SS[0] /= math.sqrt(2)
    return basis_SS.float().to(device)
