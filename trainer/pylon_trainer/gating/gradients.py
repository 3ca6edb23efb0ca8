"""Gradients: the way back over a piece of a model whose output's gradient is given, and where its results go.

An engine cuts a model into pieces with a graph of their own, so it hands gradients from piece to piece itself. What
parameters receive goes to a sink at once, so that no more than one piece's gradients wait anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import Parameter

Sink = Callable[[Parameter, Tensor], None]
"""Takes a parameter and what is to be added to its gradient."""


def accumulate(parameter: Parameter, gradient: Tensor) -> None:
    """The sink of a training loop: adds to `.grad`."""
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad += gradient


def send_back(output: Tensor, gradient: Tensor) -> None:
    """output.backward(gradient)."""
    _Given.apply(output, gradient).backward()


@torch.enable_grad()
def go_back(
    output: Tensor, gradient: Tensor, parameters: Sequence[Parameter], sink: Sink, *leaves: Tensor
) -> tuple[Tensor, ...]:
    """From the gradient at an output to those at the leaves that it was computed from; the parameters' go to the
    sink."""
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    if not (leaves or wanted):  # all frozen, though a hook may make the output require a gradient, as PEFT's does
        return ()
    received = torch.autograd.grad(_Given.apply(output, gradient), [*leaves, *wanted], allow_unused=True)
    for parameter, at_parameter in zip(wanted, received[len(leaves) :], strict=True):
        if at_parameter is not None:
            sink(parameter, at_parameter)
    return received[: len(leaves)]


@contextmanager
def frozen(parameters: Iterable[Parameter]) -> Iterator[None]:
    """These parameters are constants in here."""
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_()


class _Given(Function):
    """A scalar whose gradient at the output is the one given. Autograd, handed a gradient, would first import sympy for
    seconds to look at its shape."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient.to(output.dtype)
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient, None
