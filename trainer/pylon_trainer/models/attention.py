"""Causal attention, over a whole sequence or within documents: which kernel runs where.

Plainly causal attention is SDPA's. Within documents SDPA would compute every block of a dense mask; on CUDA
FlexAttention skips the blocks between documents (4 x 4096 tokens, documents of 700, H200, bfloat16, forward and
backward: 1.2 ms and 0.2 ms for the mask, against 3.9 ms). The CPU keeps the dense mask, for FlexAttention has no
backward pass there; and it is imported only where it is used, because it brings sympy, which takes seconds.

Shapes: B sequences, T tokens, H query heads, K key and value heads, E width of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    Mask = Tensor | BlockMask


def document_mask(documents_BT: Tensor) -> Mask:
    """Lets a token see the tokens of its own document up to itself.

    documents_BT: number of each token's document.
    """
    sequences, tokens = documents_BT.shape
    if documents_BT.is_cuda:
        from torch.nn.attention.flex_attention import create_block_mask

        def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
            return (documents_BT[b, query] == documents_BT[b, key]) & (query >= key)

        mask: BlockMask = _compiled(create_block_mask)(sees, sequences, None, tokens, tokens, device="cuda")
        return mask
    same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
    return same_BTT.tril().unsqueeze(1)


def attend(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, mask: Mask | None) -> Tensor:
    """Attention output B x H x T x E; H / K query heads share a key and a value head. mask None: causal."""
    grouped = q_BHTE.shape[1] != k_BKTE.shape[1]
    if not (mask is None or isinstance(mask, Tensor)):
        from torch.nn.attention.flex_attention import flex_attention

        y_BHTE: Tensor = _compiled(flex_attention)(q_BHTE, k_BKTE, v_BKTE, block_mask=mask, enable_gqa=grouped)
        return y_BHTE
    return F.scaled_dot_product_attention(
        q_BHTE, k_BKTE, v_BKTE, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """FlexAttention is fast only as compiled code; compiled when it is first needed, which takes seconds."""
    return torch.compile(function)
