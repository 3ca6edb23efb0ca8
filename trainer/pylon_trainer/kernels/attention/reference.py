"""Attention of scattered rows in plain PyTorch: the definition that the kernels are held to.

It sets every row against the keys of all sequences at once, which no one should do at size.

Shapes: as in `kernels.attention`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pylon_trainer.kernels.attention import Layout


def attend_rows(
    q_HKE: Tensor,
    k_BJTE: Tensor,
    v_BJTE: Tensor,
    layout: Layout,
    own_JKE: tuple[Tensor, Tensor] | None,
    scale: float,
) -> Tensor:
    """H x K x E, by autograd through a masked softmax."""
    heads = q_HKE.shape[0]
    k_HNE, v_HNE = _by_head(k_BJTE, heads), _by_head(v_BJTE, heads)
    if own_JKE is not None:
        rows_K = layout.rows_K.long()
        own_k_HKE, own_v_HKE = (x_JKE.repeat_interleave(heads // len(x_JKE), 0) for x_JKE in own_JKE)
        k_HNE = k_HNE.detach().index_copy(1, rows_K, own_k_HKE)
        v_HNE = v_HNE.detach().index_copy(1, rows_K, own_v_HKE)
    places_N = torch.arange(k_HNE.shape[1], device=q_HKE.device)
    hidden_KN = (places_N > layout.rows_K[:, None]) | (places_N < layout.first_K[:, None])
    logits_HKN = (q_HKE @ k_HNE.transpose(1, 2) * scale).masked_fill(hidden_KN, -torch.inf)
    return logits_HKN.softmax(2) @ v_HNE


def _by_head(x_BJTE: Tensor, heads: int) -> Tensor:
    """H x N x E: every query head's own copy."""
    return x_BJTE.transpose(0, 1).flatten(1, 2).repeat_interleave(heads // x_BJTE.shape[1], 0)
