"""Export: the trained model as Hugging Face files, in a form that transformers has: a Transformer as
`LlamaForCausalLM`, Resonate as `GraniteMoeHybridForCausalLM` without experts.

The tables below are the whole translation: our blocks compute what theirs do, with the same weights. What those forms
cannot hold is refused; factorised embeddings and adapted layers are multiplied out.
"""

from __future__ import annotations

import json
import math
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from pylon_api.training import ModelSpec, ResonateSpec
from pylon_trainer.checkpoint.storage import Storage
from pylon_trainer.data.tokenizer import Tokenizer
from pylon_trainer.errors import ConfigError
from pylon_trainer.models import Decoder, Transformer
from pylon_trainer.models.decoder import Block
from pylon_trainer.models.resonate.adaptation import AdaptedBlock
from pylon_trainer.models.resonate.dlra import AdaptedLinear
from pylon_trainer.models.resonate.model import Kind, kind_of
from pylon_trainer.models.transformer import intermediate_size

Names = dict[str, tuple[str, ...]]
"""Their name of each parameter in a block, and ours; several are one below the other."""

ATTENTION: Names = {
    "input_layernorm.weight": ("attention_norm.weight",),
    "self_attn.q_proj.weight": ("attention.query.weight",),
    "self_attn.k_proj.weight": ("attention.key.weight",),
    "self_attn.v_proj.weight": ("attention.value.weight",),
    "self_attn.o_proj.weight": ("attention.output.weight",),
    "post_attention_layernorm.weight": ("mlp_norm.weight",),
}
SCAN: Names = {
    "input_layernorm.weight": ("mixer_norm.weight",),
    "mamba.in_proj.weight": ("mixer.input.weight",),
    "mamba.conv1d.weight": ("mixer.convolution.weight",),
    "mamba.conv1d.bias": ("mixer.convolution.bias",),
    "mamba.A_log": ("mixer.log_poles",),
    "mamba.dt_bias": ("mixer.step_bias",),
    "mamba.D": ("mixer.skip",),
    "mamba.norm.weight": ("mixer.norm_weight",),
    "mamba.out_proj.weight": ("mixer.output.weight",),
    "post_attention_layernorm.weight": ("mlp_norm.weight",),
}
LLAMA_MLP: Names = {
    "mlp.gate_proj.weight": ("mlp.gate.weight",),
    "mlp.up_proj.weight": ("mlp.up.weight",),
    "mlp.down_proj.weight": ("mlp.down.weight",),
}
HYBRID_MLP: Names = {
    "shared_mlp.input_linear.weight": ("mlp.gate.weight", "mlp.up.weight"),
    "shared_mlp.output_linear.weight": ("mlp.down.weight",),
}
MIXERS = {Kind.ATTENTION: ATTENTION, Kind.SCAN: SCAN}
LAYER_TYPES = {Kind.ATTENTION: "attention", Kind.SCAN: "mamba"}
"""What the hybrid's config calls a block; transformers 5 has other names and reads these too."""
SCAN_CHUNK_TOKENS = 256
"""Tokens that others' scans take at a time: their default, which changes speed and not results."""


def export_hugging_face(model: Decoder, tokenizer: Tokenizer, uri: str, *, sequence_length: int) -> None:
    """Write the model and its tokenizer to a directory of any store.

    config.json comes last and goes first, so that a directory that holds one is complete; a failed export removes what
    it wrote. Raises ConfigError or StorageError.
    """
    if problem := model.spec.export_problem:
        raise ConfigError(f"training.{problem}")
    files = {
        "model.safetensors": safetensors.torch.save(weights_of(model), metadata={"format": "pt"}),
        "tokenizer.json": tokenizer.to_json().encode(),
        "tokenizer_config.json": _json(_tokenizer_config(tokenizer, sequence_length)),
        "config.json": _json(config_of(model, tokenizer, sequence_length)),
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


@torch.no_grad()
def weights_of(model: Decoder) -> dict[str, Tensor]:
    """Every weight on the CPU under transformers' name; a tied head has none of its own."""
    weights = {"model.embed_tokens.weight": model.embedding_weight, "model.norm.weight": model.norm.weight}
    mlp = LLAMA_MLP if isinstance(model, Transformer) else HYBRID_MLP
    for number, block in enumerate(model.blocks):
        for theirs, ours in (MIXERS[kind_of(model.spec, number)] | mlp).items():
            weight = torch.cat([_parameter(block, name).cpu() for name in ours])
            # A convolution of theirs has a dimension for channels that it mixes, which here is each by itself.
            weights[f"model.layers.{number}.{theirs}"] = weight.unsqueeze(1) if "conv1d.weight" in theirs else weight
    if not model.spec.tie_embeddings:
        weights["lm_head.weight"] = model.head_weight
    return {name: weight.cpu().contiguous() for name, weight in weights.items()}


def _parameter(block: Block, name: str) -> Tensor:
    layer = block.get_submodule(name.rpartition(".")[0])
    if isinstance(block, AdaptedBlock) and isinstance(layer, AdaptedLinear):
        return layer.product(block.adaptation.ranks.active_R)
    return block.get_parameter(name)


def config_of(model: Decoder, tokenizer: Tokenizer, sequence_length: int) -> dict[str, Any]:
    """config.json for this model."""
    spec = model.spec
    return {
        **(_LLAMA if isinstance(model, Transformer) else _hybrid_config(spec)),
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
        "tie_word_embeddings": spec.tie_embeddings,
        "bos_token_id": tokenizer.end_of_text,
        "eos_token_id": tokenizer.end_of_text,
        "torch_dtype": str(torch.float32).removeprefix("torch."),
    }


_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False}


def _hybrid_config(spec: ModelSpec) -> dict[str, Any]:
    """What the hybrid's config has beside Llama's."""
    own = spec.resonate or ResonateSpec()
    kinds = [kind_of(spec, number) for number in range(spec.layers)]
    return {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        "layer_types": [LAYER_TYPES[kind] for kind in kinds],
        # A cache of transformers asks a block that attends how many tokens it holds, and fails where none does.
        "use_cache": Kind.ATTENTION in kinds,
        "shared_intermediate_size": intermediate_size(spec),
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "position_embedding_type": "rope",
        "attention_multiplier": 1 / math.sqrt(spec.hidden_size // spec.heads),
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "mamba_expand": own.expand,
        "mamba_n_heads": spec.hidden_size * own.expand // own.head_width,
        "mamba_d_head": own.head_width,
        "mamba_d_state": own.state_size,
        "mamba_d_conv": own.conv_width,
        "mamba_n_groups": own.groups,
        "mamba_chunk_size": SCAN_CHUNK_TOKENS,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
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
