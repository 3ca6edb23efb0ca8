"""Parameters of every kind that an optimizer tells apart, with gradients of their own, far smaller than a model's."""

from __future__ import annotations

import torch
from torch.nn import Parameter

SHAPES = {
    "embedding.weight": (50, 32),
    "blocks.0.mlp.up.weight": (48, 32),
    "blocks.0.mlp.down.weight": (32, 48),
    "blocks.0.convolution.weight": (64, 4),
    "blocks.0.norm.weight": (32,),
    "blocks.1.mlp.up.weight": (48, 32),
    "blocks.1.mlp.down.weight": (32, 48),
    "blocks.1.scale": (),
}
HIDDEN = [name for name in SHAPES if ".mlp." in name]
"""Matrices inside the network."""


def toy_parameters() -> dict[str, Parameter]:
    """The same every time."""
    draw = torch.Generator().manual_seed(0)
    return {name: Parameter(0.1 * torch.randn(shape, generator=draw)) for name, shape in SHAPES.items()}


def set_gradients(parameters: dict[str, Parameter], seed: int) -> None:
    """The same for the same seed."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=draw)


def copies(parameters: dict[str, Parameter]) -> dict[str, Parameter]:
    """Others of the same values, without gradients."""
    return {name: Parameter(parameter.detach().clone()) for name, parameter in parameters.items()}


def bits(parameters: dict[str, Parameter]) -> dict[str, list[float]]:
    """To be compared exactly."""
    return {name: parameter.detach().flatten().tolist() for name, parameter in parameters.items()}
