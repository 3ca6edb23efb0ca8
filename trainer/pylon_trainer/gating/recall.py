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
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from pylon_trainer.models.context import Linear


class Product(NamedTuple):
    """What a linear layer computed."""

    output: Tensor
    weight: Tensor
    """The layer's weight as it was multiplied: a copy in the precision of autocast, or the weight itself. Kept, so that
    a step casts each weight once; that costs 2 bytes per parameter of the blocks from the forward pass to the way
    back."""


def recall(layer: Linear, x: Tensor, product: Product) -> Tensor:
    """The layer's output at rows x, which `product` already holds for these rows."""
    known: Tensor = _KnownLinear.apply(x, layer.weight, layer.bias, product.weight, product.output)
    return known


class _KnownLinear(Function):
    """x W^T + b whose value is given. The gradients are those of the product, computed in the precision of the value;
    those of the parameters come in the parameters' own."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, cast: Tensor, known: Tensor) -> Tensor:  # noqa: ARG004
        return known.view_as(known)

    @staticmethod
    def setup_context(
        ctx: Any,
        inputs: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor],
        output: Tensor,  # noqa: ARG004
    ) -> None:
        x, weight, bias, cast, known = inputs
        ctx.save_for_backward(x.to(known.dtype), cast)
        ctx.x_dtype, ctx.weight_dtype = x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (gradient,) = gradients
        x, cast = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _, _ = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            (gradient @ cast).to(ctx.x_dtype) if needs_x else None,
            product_as(ctx.weight_dtype, rows.T, x.flatten(0, -2)) if needs_weight else None,
            rows.sum(0, dtype=ctx.bias_dtype) if needs_bias else None,
            None,
            None,
        )


def product_as(dtype: torch.dtype, a: Tensor, b: Tensor) -> Tensor:
    """a @ b in a precision that may be higher than theirs; on CUDA written by the product itself, without a copy."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda and dtype is torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)
