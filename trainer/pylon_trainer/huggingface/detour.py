"""Detour: a value whose way back is not autograd's.

Whoever takes the loss of a gated step calls `backward` on it as on any other: distributed wrappers, gradient scalers,
accumulation and hooks see parameters that receive gradients. So the gradients leave an `autograd.Function` as its
outputs, and nothing inside adds to `.grad`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Collect = Callable[[Tensor, Tensor], None]
"""Takes an input and what is to be added to its gradient."""

WayBack = Callable[[Tensor, Collect], None]
"""Takes the gradient at the value; hands out the gradients of inputs. To be called once."""


def detour(value: Tensor, back: WayBack, inputs: Sequence[Tensor]) -> Tensor:
    """The value, which has no graph, with gradients that `back` computes. inputs: parameters, and whatever else it may
    hand gradients of."""
    joined: Tensor = _Detour.apply(value, back, *inputs)
    return joined


class _Detour(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, back: WayBack, *inputs: Tensor) -> Tensor:
        ctx.back, ctx.inputs = back, inputs
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        back, ctx.back = ctx.back, None  # with all that it holds
        if back is None:
            raise RuntimeError("a gated loss keeps nothing after its first backward pass; compute it again")
        collected: dict[Tensor, Tensor] = {}

        def collect(x: Tensor, gradient: Tensor) -> None:
            known = collected.get(x)
            collected[x] = gradient if known is None else known.add_(gradient)

        with torch.enable_grad():  # autograd switches it off on its own way
            back(gradient, collect)
        return None, None, *(collected.get(x) for x in ctx.inputs)
