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
from torch.nn import Parameter

from pylon_trainer.gating.gradients import Sink

WayBack = Callable[[Tensor, Sink], None]
"""Takes the gradient at the value; hands out the gradients of parameters. To be called once."""


def detour(value: Tensor, back: WayBack, parameters: Sequence[Parameter]) -> Tensor:
    """The value, which has no graph, with gradients that `back` computes. parameters: all that it may hand out."""
    joined: Tensor = _Detour.apply(value, back, *parameters)
    return joined


class _Detour(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, back: WayBack, *parameters: Parameter) -> Tensor:
        ctx.back, ctx.parameters = back, parameters
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        collected: dict[Parameter, Tensor] = {}

        def sink(parameter: Parameter, gradient: Tensor) -> None:
            known = collected.get(parameter)
            collected[parameter] = gradient if known is None else known.add_(gradient)

        with torch.enable_grad():  # autograd switches it off on its own way
            ctx.back(gradient, sink)
        return None, None, *(collected.get(parameter) for parameter in ctx.parameters)
