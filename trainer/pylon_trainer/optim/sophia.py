"""Sophia: a momentum divided by the curvature, value by value, and clipped (Liu et al. 2023, arXiv 2305.14342).

The curvature comes from outside, every few steps (curvature.py); until the first and wherever it is tiny, values
move by the sign of the momentum. pytorch-optimizer's SophiaH, given the same curvature, is the reference in the tests;
it cannot leave a bad step out on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pylon_api.training import OptimizerSpec
from pylon_trainer.optim.rule import Group, Step, blend, or_default, zeros_like

BETA1, BETA2, EPSILON = 0.965, 0.99, 1e-15
CURVATURE_SCALE = 0.05
"""Of the curvature below a momentum, gamma in the paper: the larger, the fewer values are clipped."""


class Sophia:
    """See Rule."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], spec: OptimizerSpec) -> None:
        self.parameters = parameters
        self.state = {"first_moments": zeros_like(parameters), "curvatures": zeros_like(parameters)}
        self._beta1 = or_default(spec.beta1, BETA1)
        self._beta2 = or_default(spec.beta2, BETA2)
        self._epsilon = or_default(spec.epsilon, EPSILON)

    def apply(self, group: Group, step: Step) -> None:
        """See Rule."""
        step.clip(group.gradients)
        moments = [self.state["first_moments"][name] for name in group.names]
        step.blend(moments, group.gradients, 1.0 if group.is_smoothed else 1 - self._beta1)
        for batch in group.batches():
            scales = list(torch._foreach_mul([self.state["curvatures"][name] for name in batch.names], CURVATURE_SCALE))
            torch._foreach_clamp_min_(scales, self._epsilon)
            directions = list(torch._foreach_div([self.state["first_moments"][name] for name in batch.names], scales))
            torch._foreach_clamp_min_(directions, -1.0)
            torch._foreach_clamp_max_(directions, 1.0)
            step.move(batch.parameters, directions, step.learning_rate, batch.weight_decay)

    def observe(self, gradients: dict[str, Tensor], tokens: int, is_bad: Tensor) -> None:
        """Take in the mean gradient over this many tokens of labels that the model has drawn itself.

        tokens x its square is the estimate (Gauss-Newton-Bartlett, the paper's algorithm 2). is_bad: 1 to leave it out.
        """
        squares = [gradients[name].square_().mul_(tokens) for name in self.parameters]
        blend(list(self.state["curvatures"].values()), squares, 1 - self._beta2, is_skipped=is_bad)
