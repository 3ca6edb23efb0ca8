"""What surrounds a mixer's scan, short convolution and gated norm: kernels beside compiled PyTorch and a copy.

    python benchmarks/mixer_kernels.py

Inputs are strided as in a mixer, parts of a projection's or the convolution's output. Forward is without gradients,
backward what both ways add to it; passes are captured as graphs, as the smaller shape's take less time than their
launches. Bytes are those that must be read and written once; weights and sums over tokens are not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import both_ways_ms, copy_bytes_per_s, publish, results_directory
from torch import Tensor

from pylon_trainer.kernels.convolution import operators as convolution
from pylon_trainer.kernels.convolution import reference as plain_convolution
from pylon_trainer.kernels.gated_norm import operators as norm
from pylon_trainer.kernels.gated_norm import reference as plain_norm

SHAPES = [(8, 8192, 768), (64, 512, 512)]
"""Sequences, tokens of each, hidden width; a mixer is twice as wide inside."""
HEAD_WIDTH, STATE_SIZE, CONVOLUTION_WIDTH = 64, 128, 4
EPSILON = 1e-5

Operation = Callable[..., Tensor]


def gated_norm_inputs(sequences: int, tokens: int, inner: int) -> tuple[list[Tensor], tuple[object, ...]]:
    """y, values, skip, gate, weight; groups and epsilon."""
    y, values, gate = (_part(sequences, tokens, inner, beside) for beside in (0, 2 * STATE_SIZE, inner))
    return [y, values, _random(inner // HEAD_WIDTH), gate, _random(inner)], (1, EPSILON)


def convolution_inputs(sequences: int, tokens: int, inner: int) -> tuple[list[Tensor], tuple[object, ...]]:
    """x, weight, bias; no documents and nothing before the first token."""
    channels = inner + 2 * STATE_SIZE
    x = _part(sequences, tokens, channels, inner)
    return [x, _random(channels, CONVOLUTION_WIDTH), _random(channels)], (None, None)


def _part(sequences: int, tokens: int, width: int, beside: int) -> Tensor:
    return _random(sequences, tokens, width + beside).bfloat16()[..., :width]


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda")


KERNELS: dict[str, tuple[Operation, Operation, Callable[..., tuple[list[Tensor], tuple[object, ...]]]]] = {
    "convolution": (convolution.convolve, plain_convolution.convolve, convolution_inputs),
    "gated_norm": (norm.gated_norm, plain_norm.gated_norm, gated_norm_inputs),
}


def measure(name: str, sequences: int, tokens: int, hidden: int, copy: float) -> list[dict[str, Any]]:
    """A row each way."""
    torch._dynamo.reset()
    kernel, plain, inputs = KERNELS[name]
    tensors, rest = inputs(sequences, tokens, 2 * hidden)
    large_bytes = sum(x.numel() * x.element_size() for x in tensors if x.dim() == 3)
    out = kernel(*tensors, *rest)
    # Forward reads what is large and writes the result; backward reads both and writes gradients of what is large.
    moved_bytes = {"forward": large_bytes + out.nbytes, "backward": 2 * large_bytes + out.nbytes}
    leaves = [x.detach().requires_grad_() for x in tensors]
    ours_ms, compiled_ms = (
        dict(zip(moved_bytes, both_ways_ms(partial(run, *leaves, *rest), *leaves), strict=True))
        for run in (kernel, torch.compile(plain, dynamic=False))
    )
    return [
        {
            "kernel": name,
            "way": way,
            "tokens": sequences * tokens,
            "channels": out.shape[2],
            "milliseconds": ours_ms[way],
            "copy_fraction": moved_bytes[way] / (ours_ms[way] / 1e3) / copy,
            "compiled_milliseconds": compiled_ms[way],
            "speedup_vs_compiled": compiled_ms[way] / ours_ms[way],
        }
        for way in moved_bytes
    ]


def main() -> None:
    directory = results_directory("Measure the kernels around a mixer's scan.")
    copy = copy_bytes_per_s()
    rows = [row for shape in SHAPES for name in KERNELS for row in measure(name, *shape, copy)]
    publish("mixer_kernels", rows, directory)


if __name__ == "__main__":
    main()
