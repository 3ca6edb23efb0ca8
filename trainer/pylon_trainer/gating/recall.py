"""Recall: run a block a second time, on chosen rows, without its matrix products, from their outputs of the first time.

A block that runs in a `KeepingContext` (rows.py) leaves a `Product` per linear layer. On the way back the same block
runs on some of the rows and takes those outputs instead of multiplying again, with gradients like any other code, so
that it costs no second forward pass. The cheap operations between the products (norms, activations, rotations) are
computed anew. It works as selective activation checkpointing does, one level higher, because the rows are chosen in
between.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from pylon_trainer.models.context import Linear


class Product(NamedTuple):
    """What a linear layer computed."""

    output: Tensor
    weight: Tensor
    """The layer's weight as it was multiplied: a copy in the precision of autocast, or the weight itself. Kept, so that
    a micro-batch casts each weight once with SinglePass and Keep; Recompute and TwoPass cast it again on the way back.
    That takes 2 bytes per parameter of the blocks from the forward pass to the way back."""


def multiply(layer: Linear, x: Tensor, precision: torch.dtype | None) -> Product:
    """The layer's output in a precision; None: that of its weight."""
    weight = layer.weight.detach()
    if precision is not None:
        weight = weight.to(precision)
    return Product(_Linear.apply(x.to(weight.dtype), layer.weight, layer.bias, weight, None), weight)


def recall(layer: Linear, x: Tensor, product: Product) -> Tensor:
    """The layer's output at rows x, which `product` already holds for these rows."""
    output: Tensor = _Linear.apply(x.to(product.weight.dtype), layer.weight, layer.bias, product.weight, product.output)
    return output


class _Linear(Function):
    """x W^T + b, computed with a cast of W, or already known.

    Gradients are those of the product, computed in the precision of the cast. Those of the parameters come in the
    parameters' own precision, written by the product itself where the device can, and not cast afterwards.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, cast: Tensor, known: Tensor | None) -> Tensor:  # noqa: ARG004
        if known is not None:
            return known.view_as(known)
        return F.linear(x, cast, None if bias is None else bias.to(cast.dtype))

    @staticmethod
    def setup_context(
        ctx: Any,
        inputs: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None],
        output: Tensor,  # noqa: ARG004
    ) -> None:
        x, weight, bias, cast, _ = inputs
        ctx.save_for_backward(x, cast)
        ctx.weight_dtype = weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (gradient,) = gradients
        x, cast = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _, _ = ctx.needs_input_grad
        gradient_KO, x_KI = gradient.flatten(0, -2), x.flatten(0, -2)
        return (
            gradient @ cast if needs_x else None,
            _product_as(ctx.weight_dtype, gradient_KO.T, x_KI) if needs_weight else None,
            gradient_KO.sum(0, dtype=ctx.bias_dtype) if needs_bias else None,
            None,
            None,
        )


def _product_as(dtype: torch.dtype, a: Tensor, b: Tensor) -> Tensor:
    """a @ b in a precision that may be higher than theirs."""
    if a.is_cuda and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)
