"""Lion: the sign of a momentum (Chen et al. 2023, arXiv 2302.06675, algorithm 2).

Every value moves by the same amount, so learning rates are a third to a tenth of AdamW's, and weight decay as much
more. Libraries have it without a way to leave a bad step out on the device; pytorch-optimizer's is the reference in
the tests.
"""

from __future__ import annotations

import torch

from pylon_api.training import OptimizerSpec
from pylon_trainer.optim.rule import Group, Step, or_default, zeros_like

BETA1, BETA2 = 0.9, 0.99


class Lion:
    """See Rule."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], spec: OptimizerSpec) -> None:
        self.parameters = parameters
        self.state = {"first_moments": zeros_like(parameters)}
        self._beta1 = or_default(spec.beta1, BETA1)
        self._beta2 = or_default(spec.beta2, BETA2)

    def apply(self, group: Group, step: Step) -> None:
        """See Rule."""
        beta1 = 0.0 if group.is_smoothed else self._beta1
        step.clip(group.gradients)
        for batch in group.batches():
            moments = [self.state["first_moments"][name] for name in batch.names]
            directions = list(torch._foreach_lerp(batch.gradients, moments, beta1))
            torch._foreach_sign_(directions)
            step.move(batch.parameters, directions, step.learning_rate, batch.weight_decay)
            step.blend(moments, batch.gradients, 1 - self._beta2)
