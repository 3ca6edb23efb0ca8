"""The attention function that Hugging Face's blocks call while an engine walks over them.

It is the only place where a block lets tokens meet, so a block runs on chosen rows when this function knows the others.
What it knows comes as a keyword through the block's own `**kwargs`, never from a global.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from pylon_trainer.models.context import Context

NAME = "pylon"
"""Under which `config._attn_implementation` finds it."""


def attend(
    module: nn.Module,  # noqa: ARG001  the interface's own arguments
    query_BHTE: Tensor,
    key_BJTE: Tensor,
    value_BJTE: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001  the context knows it
    scaling: float | None = None,
    *,
    pylon_context: Context,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as the context has it, B x T x H x E."""
    width = query_BHTE.shape[-1]
    # As autocast would have it: rotations are float32 there, products are not.
    query_BHTE, key_BJTE = query_BHTE.to(value_BJTE.dtype), key_BJTE.to(value_BJTE.dtype)
    if scaling is not None and scaling != width**-0.5:
        query_BHTE = query_BHTE * (scaling * width**0.5)
    return pylon_context.attend(query_BHTE, key_BJTE, value_BJTE).transpose(1, 2), None


AttentionInterface.register(NAME, attend)
