"""Export: the trained model as Hugging Face files, in the form that `LlamaForCausalLM` and `AutoTokenizer` load.

The names below are the whole translation: our blocks compute what Llama's do, with the same weights. Factorised
embeddings have no place in that format and are multiplied out.
"""

from __future__ import annotations

import json
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from pylon_trainer.checkpoint.storage import Storage
from pylon_trainer.data.tokenizer import Tokenizer
from pylon_trainer.errors import ConfigError
from pylon_trainer.models import Decoder, Transformer
from pylon_trainer.models.transformer import intermediate_size

BLOCK_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
"""Our name of each module in a block, and Llama's."""


def export_hugging_face(model: Decoder, tokenizer: Tokenizer, uri: str, *, sequence_length: int) -> None:
    """Write the model and its tokenizer to a directory of any store.

    config.json comes last and goes first, so that a directory that holds one is complete; a failed export removes what
    it wrote. Raises ConfigError or StorageError.
    """
    if not isinstance(model, Transformer):
        raise ConfigError(
            f"training.export.format: HuggingFace has no form for architecture {model.spec.architecture}; "
            f"set Disabled and use the checkpoint"
        )
    files = {
        "model.safetensors": safetensors.torch.save(llama_weights(model), metadata={"format": "pt"}),
        "tokenizer.json": tokenizer.to_json().encode(),
        "tokenizer_config.json": _json(_tokenizer_config(tokenizer, sequence_length)),
        "config.json": _json(llama_config(model, tokenizer, sequence_length)),
    }
    store = Storage(uri)
    store.remove("config.json")
    try:
        for name, content in files.items():
            store.write(name, content)
    except BaseException:
        for name in files:
            store.remove(name)
        raise


def llama_weights(model: Transformer) -> dict[str, Tensor]:
    """Every weight on the CPU under Llama's name; a tied head has none of its own."""
    weights = {"model.embed_tokens.weight": model.embedding_weight, "model.norm.weight": model.norm.weight}
    for number, block in enumerate(model.blocks):
        for ours, theirs in BLOCK_NAMES.items():
            weights[f"model.layers.{number}.{theirs}.weight"] = block.get_parameter(f"{ours}.weight")
    if not model.spec.tie_embeddings:
        weights["lm_head.weight"] = model.head_weight
    return {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}


def llama_config(model: Transformer, tokenizer: Tokenizer, sequence_length: int) -> dict[str, Any]:
    """Llama's config.json for this model."""
    spec = model.spec
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": intermediate_size(spec),
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads or spec.heads,
        "head_dim": spec.hidden_size // spec.heads,
        "hidden_act": "silu",
        "max_position_embeddings": sequence_length,
        "initializer_range": spec.initializer_std,
        "rms_norm_eps": spec.norm_epsilon,
        # transformers 5 reads the first of these two, version 4 the second.
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_theta},
        "rope_theta": spec.rope_theta,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": spec.tie_embeddings,
        "bos_token_id": tokenizer.end_of_text,
        "eos_token_id": tokenizer.end_of_text,
        "torch_dtype": str(torch.float32).removeprefix("torch."),
    }


def _tokenizer_config(tokenizer: Tokenizer, sequence_length: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.end_of_text_token,
        "eos_token": tokenizer.end_of_text_token,
        "model_max_length": sequence_length,
        "clean_up_tokenization_spaces": False,
    }


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode() + b"\n"
