"""Recall: run row-wise code a second time without its matrix products, from their outputs of the first time.

A model's forward pass under `Record` keeps what every linear layer gave. The same code on some of the rows, under
`Recall`, takes those outputs instead of multiplying again and has gradients like any other code, so that a backward
pass over chosen rows costs no second forward pass. Cheap operations between the products (norms, activations,
rotations) are computed anew. Only `F.linear` without bias is known here; anything else simply runs again.

It works as selective activation checkpointing does, one level higher, because the rows are chosen in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode


class Record(TorchFunctionMode):
    """Appends the output of every linear layer to `outputs`."""

    def __init__(self, outputs: list[Tensor]) -> None:
        super().__init__()
        self._outputs = outputs

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is F.linear:
            self._outputs.append(result)
        return result


class Recall(TorchFunctionMode):
    """Gives linear layers, in the order of their calls, the outputs that are already known."""

    def __init__(self, outputs: Sequence[Tensor]) -> None:
        super().__init__()
        self._outputs = list(outputs)

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is F.linear:
            return _KnownLinear.apply(args[0], args[1], self._outputs.pop(0))
        return function(*args, **(kwargs or {}))


class _KnownLinear(Function):
    """x W^T whose value is given; the gradients are those of the product, in the precision that the value has."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, known: Tensor) -> Tensor:  # noqa: ARG004
        return known.view_as(known)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        x, weight, known = inputs
        ctx.save_for_backward(x.to(known.dtype), weight)
        ctx.input_dtype = x.dtype  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        return (
            (gradient @ weight.to(gradient.dtype)).to(ctx.input_dtype) if needs_x else None,
            (gradient.flatten(0, -2).T @ x.flatten(0, -2)).to(weight.dtype) if needs_weight else None,
            None,
        )
