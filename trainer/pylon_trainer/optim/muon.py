"""Muon for the matrices inside the network: momentum, made orthogonal (Jordan 2024, kellerjordan.github.io/posts/muon).

Its updates have the size of AdamW's, as Liu et al. 2025 (arXiv 2502.16982, section 2.2) found, so that AdamW's learning
rates and weight decays hold. torch.optim.Muon is the same rule, and the reference in the tests; it takes matrices one
by one, thousands of launches for a small model, and cannot leave a bad step out on the device. Refuses to judge which
matrices those are: `is_hidden_matrix` does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pylon_api.training import OptimizerSpec
from pylon_trainer.consensus.groups import Kind, kind_of
from pylon_trainer.optim.rule import Group, Step, or_default, zeros_like

MOMENTUM = 0.95
RMS = 0.2
"""Root mean square of AdamW's updates per unit of learning rate, as measured by Liu et al."""
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the odd polynomial of degree 5 whose repetition drives all singular values towards 1, steep at 0 (Jordan)."""
ITERATIONS = 5
EPSILON = 1e-7
SMALLEST_SIDE = 32
"""Narrower matrices, such as the filters of short convolutions, are rather bundles of vectors."""


class Muon:
    """See Rule."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], spec: OptimizerSpec) -> None:
        self.parameters = parameters
        self.state = {"first_moments": zeros_like(parameters)}
        self._momentum = or_default(spec.momentum, MOMENTUM)

    def apply(self, group: Group, step: Step) -> None:
        """See Rule."""
        momentum = 0.0 if group.is_smoothed else self._momentum
        step.clip(group.gradients)
        moments = [self.state["first_moments"][name] for name in group.names]
        step.blend(moments, group.gradients, 1 - momentum)
        torch._foreach_lerp_(group.gradients, moments, momentum)  # Nesterov's: one step further than the moment
        for batch in group.batches():
            orthogonal_SMN = orthogonalise(torch.stack(batch.gradients))
            torch._foreach_copy_(batch.gradients, list(orthogonal_SMN.unbind()))
            size = RMS * math.sqrt(max(orthogonal_SMN.shape[1:]))
            step.move(batch.parameters, batch.gradients, step.learning_rate * size, batch.weight_decay / size)


def is_hidden_matrix(name: str, shape: torch.Size) -> bool:
    """Whether this is the weight of a linear map between hidden states: no embedding, head, codebook or filter."""
    is_map = len(shape) == 2 and name.endswith("weight") and min(shape) >= SMALLEST_SIDE
    return is_map and kind_of(name, tuple(shape)) is Kind.MATRICES


def orthogonalise(matrices_SMN: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """About U V^T of each matrix U S V^T, by Newton-Schulz iterations: singular values end between 0.7 and 1.2.

    dtype: to compute in; by default bfloat16 on CUDA and float32 elsewhere. The result is in it.
    """
    dtype = dtype or (torch.bfloat16 if matrices_SMN.is_cuda else torch.float32)
    norm_S11 = torch.linalg.vector_norm(matrices_SMN, dim=(1, 2), keepdim=True).clamp(min=EPSILON)
    is_tall = matrices_SMN.shape[1] > matrices_SMN.shape[2]
    x: Tensor = (matrices_SMN / norm_S11).to(dtype)
    x = x.mT if is_tall else x  # the smaller product
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x
