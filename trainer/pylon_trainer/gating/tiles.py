"""Tiles: attention of scattered rows to all tokens of their sequences, by PyTorch's own attention.

The rows lie scattered, more in one sequence than in another, and how many is known to the device alone. They are laid
out in tiles of equal size, each of one sequence, so that shapes depend on the number of rows only and nothing waits for
the device. It runs everywhere; on CUDA a kernel that needs no tiles takes its place (kernels/attention).

Shapes: B sequences, T tokens, N = B * T, K chosen rows, H query heads, J key and value heads, E width of a head, G
tiles of C rows, S = G * C slots for rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TILES_PER_SEQUENCE = 2
"""Tiles per sequence if all were full. Every tile takes a copy of its sequence's keys and values; fewer tiles leave
more slots empty: of two per sequence, at most a third."""


@dataclass(frozen=True)
class Tiles:
    """Where in the tiles each row lies, and what it may see."""

    slot_K: Tensor
    """The rows' places among the G * C slots."""
    sequence_G: Tensor
    """Sequence of every tile; of tiles that stay empty, any."""
    mask_G1CT: Tensor
    """True where a query may look. Empty slots may look everywhere, as a softmax over nothing is not a number."""

    @classmethod
    def of(cls, rows_K: Tensor, starts_K: Tensor | None, sequences: int, tokens: int) -> Tiles:
        """The layout of distinct, rising rows of sequences x tokens; each sees from starts_K (None: 0) to itself."""
        sequence_K, place_K = rows_K // tokens, rows_K % tokens
        chosen, device = len(rows_K), rows_K.device
        height = max(1, -(-chosen // (TILES_PER_SEQUENCE * sequences)))
        # ceil(k / C) summed over the sequences, at most: each may add C - 1 empty slots to the K.
        tiles = (chosen + sequences * (height - 1)) // height

        count_B = (sequence_K[:, None] == torch.arange(sequences, device=device)).sum(0)
        tiles_B = (count_B + height - 1) // height
        last_tile_B = tiles_B.cumsum(0)
        first_slot_B = (last_tile_B - tiles_B) * height - (count_B.cumsum(0) - count_B)
        slot_K = first_slot_B[sequence_K] + torch.arange(chosen, device=device)
        sequence_G = torch.searchsorted(last_tile_B, torch.arange(tiles, device=device), right=True)

        place_T = torch.arange(tokens, device=device)
        mask_KT = place_T <= place_K[:, None]
        if starts_K is not None:
            mask_KT &= place_T >= starts_K[:, None]
        mask_ST = torch.ones(tiles * height, tokens, dtype=torch.bool, device=device).index_copy(0, slot_K, mask_KT)
        return cls(slot_K, sequence_G.clamp_max(sequences - 1), mask_ST.view(tiles, 1, height, tokens))

    def sizes(self) -> list[tuple[Tensor, tuple[int, ...]]]:
        """Its tensors, each with the dims whose size follows from the number of rows."""
        return [(self.slot_K, (0,)), (self.sequence_G, (0,)), (self.mask_G1CT, (0, 2))]

    def attend(self, q_1HKE: Tensor, k_BJTE: Tensor, v_BJTE: Tensor) -> Tensor:
        """1 x H x K x E."""
        y_GHCE = F.scaled_dot_product_attention(
            self._lay_out(q_1HKE),
            self._copies(k_BJTE),
            self._copies(v_BJTE),
            attn_mask=self.mask_G1CT,
            enable_gqa=q_1HKE.shape[1] != k_BJTE.shape[1],
        )
        y_KHE = y_GHCE.transpose(1, 2).flatten(0, 1).index_select(0, self.slot_K)
        return y_KHE.transpose(0, 1).unsqueeze(0)

    def _copies(self, x_BJTE: Tensor) -> Tensor:
        """Every tile's own, G x J x T x E. By a product with ones and zeros: adding up the gradients of gathered
        copies would take a CPU a twentieth of the step."""
        belongs_GB = self.sequence_G[:, None] == torch.arange(len(x_BJTE), device=x_BJTE.device)
        copies_GX: Tensor = belongs_GB.to(x_BJTE.dtype) @ x_BJTE.flatten(1)
        copies_GJTE: Tensor = copies_GX.unflatten(1, x_BJTE.shape[1:])
        return copies_GJTE

    def _lay_out(self, x_1HKE: Tensor) -> Tensor:
        """G x H x C x E; empty slots are zero."""
        tiles, _, height, _ = self.mask_G1CT.shape
        x_KHE = x_1HKE.squeeze(0).transpose(0, 1)
        x_SHE = x_KHE.new_zeros(tiles * height, *x_KHE.shape[1:]).index_copy(0, self.slot_K, x_KHE)
        return x_SHE.view(tiles, height, *x_KHE.shape[1:]).transpose(1, 2)
