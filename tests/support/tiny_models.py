"""Hugging Face models of every supported family, small and random, and batches for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

VOCABULARY, SEQUENCES, LENGTH = 43, 3, 12

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

FAMILIES: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {**_SHAPE, "tie_word_embeddings": False}),
    "llama-tied": (LlamaForCausalLM, LlamaConfig, {**_SHAPE, "tie_word_embeddings": True, "attention_bias": True}),
    "mistral": (MistralForCausalLM, MistralConfig, {**_SHAPE, "sliding_window": 5}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, _SHAPE),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {**_SHAPE, "head_dim": 8}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, {**_GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
}


def model_of(family: str = "llama", **fields: Any) -> Any:
    """A model in training mode, the same at every call."""
    torch.manual_seed(0)
    cls, config, shape = FAMILIES[family]
    model = cls(config(**shape | fields)).train()
    # Biases start at zero and norms at one, where a wrong gradient can hide.
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter.data, mean=parameter.data[0].item(), std=0.3)
    return model


def tokens_of(seed: int = 1, sequences: int = SEQUENCES) -> Tensor:
    return torch.randint(0, VOCABULARY, (sequences, LENGTH), generator=torch.Generator().manual_seed(seed))


def batch_of(kind: str = "plain") -> dict[str, Any]:
    """Arguments of a model's forward."""
    tokens_BT = tokens_of()
    batch = {"input_ids": tokens_BT, "labels": tokens_BT.clone(), "use_cache": False}
    match kind:
        case "ignored":
            batch["labels"][:, :4] = -100
        case "right padded" | "left padded":
            mask_BT = torch.ones_like(tokens_BT)
            mask_BT[1, 7:], mask_BT[2, 10:] = 0, 0
            if kind == "left padded":
                mask_BT = mask_BT.flip(-1)
            batch["attention_mask"] = mask_BT
            batch["labels"][mask_BT == 0] = -100
            # The model itself would predict the first token after padding from nothing.
            batch["labels"][:, 1:][mask_BT[:, :-1] == 0] = -100
        case "packed":
            batch["position_ids"] = torch.stack([torch.arange(LENGTH), _packed(5, 3, 4), _packed(1, 11)])
            batch["labels"][batch["position_ids"] == 0] = -100
        case "counted":
            batch["num_items_in_batch"] = torch.tensor(77)
        case "shifted":
            batch["shift_labels"] = batch["labels"].flip(0)
    return batch


def _packed(*lengths: int) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@contextmanager
def cut_attention(model: Any, chosen_BT: Tensor) -> Iterator[None]:
    """Lets no gradient through the keys and values of tokens that were not chosen."""

    def cut(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any) -> Any:
        chosen_B1T1 = chosen_BT[:, None, :, None]
        key, value = (torch.where(chosen_B1T1, x, x.detach()) for x in (key, value))
        return sdpa_attention_forward(module, query, key, value, mask, **more)

    AttentionInterface.register("cut", cut)
    AttentionMaskInterface.register("cut", sdpa_mask)
    usual = model.config._attn_implementation
    model.config._attn_implementation = "cut"
    yield
    model.config._attn_implementation = usual
