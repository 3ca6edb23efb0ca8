"""A Hugging Face decoder as a trunk that an engine can walk over.

The decoder's blocks run as they are, with whatever was patched into them. For the length of one call a block's
attention and its plain linear layers are led through the context that the engine gives; afterwards nothing is left
behind, so evaluation and generation never notice.

Shapes: B sequences, T tokens, K chosen rows, D hidden width, E width of a head.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pylon_trainer.huggingface import attention
from pylon_trainer.huggingface.families import family_of, layers_of, window_of
from pylon_trainer.models.context import Context, Linear


class HuggingFaceTrunk:
    """The decoder of a causal language model, for one batch after the other."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._family = family_of(model)
        self._body: Any = getattr(model, self._family.body)
        self.blocks: Sequence[HuggingFaceBlock] = [
            HuggingFaceBlock(layer, model.config, self._family.is_rotary) for layer in layers_of(model, self._family)
        ]
        self.place(torch.empty(0), None)

    def place(self, positions_BT: Tensor, starts_BT: Tensor | None) -> None:
        """Where the tokens of the coming batch stand: their positions, 1 x T when all sequences have the same, and the
        first place that each may see."""
        self._positions_BT, self._starts_BT = positions_BT, starts_BT

    def embed(self, tokens: Tensor, places: Tensor) -> Tensor:
        """What enters the first block."""
        x: Tensor = getattr(self._body, self._family.embedding)(tokens)
        if not self._family.is_rotary:
            x = x + getattr(self._body, self._family.positions)(places)
        return x

    def context(self, tokens_BT: Tensor, documents_BT: Tensor | None) -> Context:  # noqa: ARG002  place() knows more
        """What every block needs to know of the batch that was placed."""
        positions_BT = self._positions_BT
        if self._family.is_rotary:
            weight = getattr(self._body, self._family.embedding).weight
            cos_BTE, sin_BTE = getattr(self._body, self._family.positions)(weight, positions_BT)
        else:
            cos_BTE = sin_BTE = torch.empty(*positions_BT.shape, 0, device=tokens_BT.device)
        if len(positions_BT) == 1:
            return Context.of(positions_BT[0], cos_BTE[0], sin_BTE[0], self._starts_BT)
        return Context.of(positions_BT, cos_BTE.unsqueeze(1), sin_BTE.unsqueeze(1), self._starts_BT)

    def norm(self, x: Tensor) -> Tensor:
        """Hidden states as the head takes them."""
        normed: Tensor = getattr(self._body, self._family.norm)(x)
        return normed

    @property
    def head_weight(self) -> Tensor:
        """V x D."""
        weight: Tensor = self._model.get_output_embeddings().weight
        return weight

    @property
    def window(self) -> int | None:
        """Tokens that a token sees at most, itself included, the same in all layers."""
        return window_of(layers_of(self._model, self._family)[0])

    @property
    def is_checkpointing(self) -> bool:
        """Whether the model was told to hold little and compute twice."""
        return any(block.is_checkpointing for block in self.blocks)

    @property
    def may_overwrite(self) -> bool:
        """Whether the blocks' rotations are foreign kernels, which may write over the products that they rotate."""
        rotate = getattr(sys.modules[type(self._body).__module__], "apply_rotary_pos_emb", None)
        is_own = rotate is None or rotate.__module__.startswith("transformers.")
        return not is_own or bool(getattr(self._model, "use_kernels", False))

    def parameters(self) -> Iterator[nn.Parameter]:
        """All of the model's."""
        parameters: Iterator[nn.Parameter] = self._model.parameters()
        return parameters


class HuggingFaceBlock:
    """One layer of the decoder."""

    def __init__(self, layer: nn.Module, config: Any, is_rotary: bool) -> None:
        self._layer: Any = layer
        self._is_rotary = is_rotary
        self._config = config
        # A layer whose forward is not its class's own, or that is more than a product, simply runs again on the rows.
        self._linears = [
            module for module in layer.modules() if type(module) in _PRODUCTS and "forward" not in vars(module)
        ]

    @property
    def is_checkpointing(self) -> bool:
        """Whether the layer would run under activation checkpointing by itself."""
        return bool(getattr(self._layer, "gradient_checkpointing", False))

    def parameters(self) -> Iterator[nn.Parameter]:
        """The layer's."""
        parameters: Iterator[nn.Parameter] = self._layer.parameters()
        return parameters

    def __call__(self, x_BTD: Tensor, context: Context) -> Tensor:
        """The layer's output, for all tokens or for those that the context knows."""
        with self._led(context):
            # Not by calling it: a layer that was compiled by itself would be compiled anew for every context.
            y_BTD: Tensor = self._layer.forward(x_BTD, pylon_context=context, **self._positions(context))
        return y_BTD

    def offers(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """What the layer hands to attention: it runs up to there and no further."""
        try:
            self(x_BTD, _UpToAttention.like(context))
        except _KeysValues as met:
            return met.k_BJTE, met.v_BJTE
        raise AssertionError("a layer without attention")

    def _positions(self, context: Context) -> dict[str, Any]:
        if not self._is_rotary:
            return {}
        cos, sin = (x.view(-1, *x.shape[-2:]) for x in (context.cos, context.sin))  # without the axis of heads
        return {"position_embeddings": (cos, sin)}

    @contextmanager
    def _led(self, context: Context) -> Iterator[None]:
        usual_attention = self._config._attn_implementation
        usual_checkpointing = self.is_checkpointing
        self._config._attn_implementation = attention.NAME
        if usual_checkpointing:
            self._layer.gradient_checkpointing = False  # the engine's own business
        for linear in self._linears:
            vars(linear)["forward"] = partial(context.linear, _PRODUCTS[type(linear)](linear))
        try:
            yield
        finally:
            for linear in self._linears:
                del vars(linear)["forward"]
            if usual_checkpointing:
                self._layer.gradient_checkpointing = True
            self._config._attn_implementation = usual_attention


class _KeysValues(Exception):
    """Leaves a layer with what was looked for."""

    def __init__(self, k_BJTE: Tensor, v_BJTE: Tensor) -> None:
        self.k_BJTE, self.v_BJTE = k_BJTE, v_BJTE


@dataclass(frozen=True)
class _UpToAttention(Context):
    inner: Context

    @classmethod
    def like(cls, context: Context) -> _UpToAttention:
        return cls(context.places, context.cos, context.sin, context.starts_BT, context.mask, context)

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        return self.inner.linear(layer, x)

    def attend(self, q_BHTE: Tensor, k_BJTE: Tensor, v_BJTE: Tensor) -> Tensor:  # noqa: ARG002
        raise _KeysValues(k_BJTE, v_BJTE)


class _Transposed:
    """A Conv1D, which holds its weight inputs x outputs, as a Linear."""

    def __init__(self, layer: Conv1D) -> None:
        self._layer = layer

    @property
    def weight(self) -> Tensor:
        return self._layer.weight.T

    @property
    def bias(self) -> Tensor | None:
        return self._layer.bias


def _itself(layer: Linear) -> Linear:
    return layer


_PRODUCTS: dict[type, Callable[[Any], Linear]] = {nn.Linear: _itself, Conv1D: _Transposed}
