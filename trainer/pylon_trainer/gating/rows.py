"""Rows: chosen tokens of a micro-batch as the queries of an attention over all tokens.

The chosen tokens lie scattered, more in one sequence than in another, and how many is known to the device alone. They
are laid out in tiles of equal size, each of one sequence, so that shapes depend on the number of rows only and nothing
waits for the device.

Shapes: B sequences, T tokens, N = B * T, K chosen rows, D hidden width, H query heads, J key and value heads, E width
of a head, G tiles of C rows, S = G * C slots for rows.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pylon_trainer.models.transformer import Context

TILES_PER_SEQUENCE = 2
"""Tiles per sequence if all were full. Every tile takes a copy of its sequence's keys and values; fewer tiles leave
more slots empty: of two per sequence, at most a third."""


@dataclass(frozen=True)
class Rows:
    """Which tokens are chosen, and where in the tiles each of them lies. The same for all blocks."""

    rows_K: Tensor
    """Their places among the N tokens, distinct and rising."""
    slot_K: Tensor
    """Their places among the G * C slots."""
    sequence_G: Tensor
    """Sequence of every tile; of tiles that stay empty, any."""
    mask_G1CT: Tensor
    """True where a query may look. Empty slots may look everywhere, as a softmax over nothing is not a number."""
    cos_KE: Tensor
    sin_KE: Tensor

    @classmethod
    def of(cls, rows_K: Tensor, context: Context, sequences: int, tokens: int) -> Rows:
        """The layout of distinct, rising rows of a micro-batch of sequences x tokens."""
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

        if context.mask is None:
            mask_KT = torch.arange(tokens, device=device) <= place_K[:, None]
            cos_KE, sin_KE = context.cos[place_K], context.sin[place_K]
        else:
            mask_KT = context.mask.flatten(0, 2)[rows_K]
            cos_KE, sin_KE = context.cos.flatten(0, 2)[rows_K], context.sin.flatten(0, 2)[rows_K]
        mask_ST = torch.ones(tiles * height, tokens, dtype=torch.bool, device=device).index_copy(0, slot_K, mask_KT)
        mask_G1CT = mask_ST.view(tiles, 1, height, tokens)
        return cls(rows_K, slot_K, sequence_G.clamp_max(sequences - 1), mask_G1CT, cos_KE, sin_KE)

    def take(self, x_BTD: Tensor) -> Tensor:
        """The chosen rows, as one sequence: 1 x K x D."""
        return x_BTD.flatten(0, 1).index_select(0, self.rows_K).unsqueeze(0)


@dataclass(frozen=True)
class RowContext(Context):
    """Lets a block run on the chosen rows alone, as one sequence of K tokens: they attend to all tokens of their own
    sequence, whose keys and values are at hand."""

    rows: Rows
    k_BJTE: Tensor
    v_BJTE: Tensor

    @classmethod
    def of(cls, rows: Rows, k_BJTE: Tensor, v_BJTE: Tensor) -> RowContext:
        return cls(rows.cos_KE, rows.sin_KE, None, rows, k_BJTE, v_BJTE)

    def attend(self, q_1HKE: Tensor, k_1JKE: Tensor, v_1JKE: Tensor) -> Tensor:
        """1 x H x K x E. The rows' own keys and values take their places among the others, so that gradients reach
        them."""
        q_GHCE = self._tile(q_1HKE)
        y_GHCE = F.scaled_dot_product_attention(
            q_GHCE,
            self._with_own(self.k_BJTE, k_1JKE),
            self._with_own(self.v_BJTE, v_1JKE),
            attn_mask=self.rows.mask_G1CT,
            enable_gqa=q_1HKE.shape[1] != k_1JKE.shape[1],
        )
        y_KHE = y_GHCE.transpose(1, 2).flatten(0, 1).index_select(0, self.rows.slot_K)
        return y_KHE.transpose(0, 1).unsqueeze(0)

    def _tile(self, x_1HKE: Tensor) -> Tensor:
        """G x H x C x E; empty slots are zero."""
        tiles, _, height, _ = self.rows.mask_G1CT.shape
        x_KHE = x_1HKE.squeeze(0).transpose(0, 1)
        x_SHE = x_KHE.new_zeros(tiles * height, *x_KHE.shape[1:]).index_copy(0, self.rows.slot_K, x_KHE)
        x_GCHE: Tensor = x_SHE.unflatten(0, (tiles, height))
        return x_GCHE.transpose(1, 2)

    def _with_own(self, x_BJTE: Tensor, own_1JKE: Tensor) -> Tensor:
        """Every tile's keys or values, G x J x T x E."""
        own_KJE = own_1JKE.squeeze(0).transpose(0, 1)
        x_BTJE = x_BJTE.transpose(1, 2)
        x_NJE = x_BTJE.flatten(0, 1).index_copy(0, self.rows.rows_K, own_KJE)
        # Not by brackets, whose backward pass sorts the indices.
        return x_NJE.view(x_BTJE.shape).index_select(0, self.rows.sequence_G).transpose(1, 2)


@dataclass(frozen=True)
class KeepingContext(Context):
    """The plain context, which hands out the keys and values that it saw."""

    kept: list[Tensor] = dataclasses.field(default_factory=list)

    def attend(self, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor) -> Tensor:
        """As Context has it."""
        self.kept.extend((k_BKTE, v_BKTE))
        return super().attend(q_BHTE, k_BKTE, v_BKTE)
