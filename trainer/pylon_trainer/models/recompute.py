"""Recompute: run a part of a block without holding anything but its inputs, and run it again on the way back.

Compiled, that is torch's own checkpoint, which the compiler knows. Eagerly it is not: calling that imports the whole
compiler first, ten seconds of CPU time in every process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

Part = Callable[..., Tensor]


def recomputed(part: Part, owner: nn.Module, *tensors: Tensor, autocast: torch.dtype | None = None) -> Tensor:
    """part(*tensors), with gradients for the tensors and for the owner's parameters.

    The part runs under autocast to this type or, by default, without, so that it does the same both times wherever the
    way back is taken from; it must draw no random numbers.
    """

    def run(*given: Tensor) -> Tensor:
        device = given[0].device.type
        with torch.autocast(device, dtype=autocast, enabled=autocast is not None, cache_enabled=False):
            return part(*given)

    if not torch.is_grad_enabled():
        return run(*tensors)
    y: Tensor
    if torch.compiler.is_compiling():
        y = checkpoint(run, *tensors, use_reentrant=False, preserve_rng_state=False)
    else:
        y = _Recomputed.apply(run, len(tensors), *tensors, *owner.parameters())
    return y


class _Recomputed(Function):
    @staticmethod
    def forward(ctx: Any, run: Part, count: int, *inputs: Tensor) -> Tensor:
        ctx.run, ctx.count = run, count
        ctx.save_for_backward(*inputs)
        return run(*inputs[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[2:]
        tensors, parameters = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        leaves = [x.detach().requires_grad_(need) for x, need in zip(tensors, needs, strict=False)]
        wanted = [x for x, need in zip([*leaves, *parameters], needs, strict=True) if need]
        with torch.enable_grad():
            # A product, because autograd, handed a gradient, would first import sympy to look at its shape.
            loss = (ctx.run(*leaves) * gradients[0]).sum()
        # Of all that wants a gradient, nothing need have entered the part: advice, where there is no port.
        known = torch.autograd.grad(loss, wanted, allow_unused=True) if loss.requires_grad else [None] * len(wanted)
        received = iter(known)
        return None, None, *(next(received) if need else None for need in needs)
