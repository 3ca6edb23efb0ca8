"""Families of Hugging Face models whose blocks an engine can walk, and why others are refused.

A family says where a causal language model keeps its parts. Everything that a gated step would compute differently from
the model itself is refused here, by name and before training: dropout (a second look at a row would drop other
numbers), windows that differ from layer to layer, heads with a bias or an adapter.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pylon_trainer.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Family:
    """Attribute names, from the model down."""

    body: str
    """The decoder inside the causal language model; the other names are attributes of it."""
    layers: str
    embedding: str
    norm: str
    positions: str
    """Module that turns positions into angles (rotary) or into vectors that are added to the embedding."""
    is_rotary: bool


_LLAMA = Family("model", "layers", "embed_tokens", "norm", "rotary_emb", is_rotary=True)
_GPT2 = Family("transformer", "h", "wte", "ln_f", "wpe", is_rotary=False)

FAMILIES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "GPT2LMHeadModel": _GPT2,
}


def family_of(model: nn.Module) -> Family:
    """The family of a model's class or of a class that it derives from. Raises ConfigError when there is none."""
    return FAMILIES[_class_of(model).__name__]


def _class_of(model: nn.Module) -> type:
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            return cls
    raise ConfigError(f"model class {type(model).__name__} is not supported; supported are {', '.join(FAMILIES)}")


def check_ends(model: nn.Module) -> None:
    """Raises ConfigError for a forward or a head that is not the family's: a loss from hidden states skips them."""
    cls = _class_of(model)
    if type(model).forward is not cls.forward:  # type: ignore[attr-defined]
        raise ConfigError(
            f"{type(model).__name__}.forward: a gated step would leave out what it adds to {cls.__name__}.forward; "
            f"train a {cls.__name__}, and add the rest outside the model"
        )
    head = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ConfigError(f"output head {type(head).__name__}: only a Linear without bias and adapter is supported")


def check(model: nn.Module) -> None:
    """Raises ConfigError for what a gated step would compute differently from the model."""
    check_ends(model)
    family, config = family_of(model), model.config
    for option in ("output_hidden_states", "output_attentions"):
        if getattr(config, option, False):
            raise ConfigError(f"config.{option}: a gated step has none to give; set it to False")
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise ConfigError(f"{name}: dropout {module.p} cannot be repeated on chosen rows; set it to 0")
        dropout = getattr(module, "attention_dropout", 0.0)
        if isinstance(dropout, float) and dropout > 0:
            raise ConfigError(f"{name}.attention_dropout: {dropout} cannot be repeated on chosen rows; set it to 0")
    windows = {window_of(layer) for layer in layers_of(model, family)}
    if len(windows) > 1:
        raise ConfigError(
            f"config.layer_types: windows of {sorted(windows, key=str)} tokens differ between layers; "
            "set use_sliding_window=False"
        )


def layers_of(model: nn.Module, family: Family) -> list[nn.Module]:
    """The decoder's blocks, in order."""
    return list(getattr(getattr(model, family.body), family.layers))


def window_of(layer: nn.Module) -> int | None:
    """Tokens that a token of this layer sees, itself included; None without a limit."""
    attention = getattr(layer, "self_attn", None)
    # Mistral reads its one window from the configuration; Llama and GPT-2 have none.
    holder = attention if hasattr(attention, "sliding_window") else getattr(attention, "config", None)
    window: int | None = getattr(holder, "sliding_window", None)
    return window
