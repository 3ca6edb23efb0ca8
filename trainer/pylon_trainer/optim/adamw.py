"""AdamW: decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101).

Calls torch's fused kernel itself instead of through torch.optim: that imports the compiler at the first optimizer,
seconds of CPU time at every start, and keeps state by number instead of name. The kernel clips on its way.
"""

from __future__ import annotations

import torch

from pylon_api.training import OptimizerSpec
from pylon_trainer.optim.rule import Group, Step, or_default, zeros_like

BETA1, BETA2, EPSILON = 0.9, 0.95, 1e-8


class AdamW:
    """See Rule."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], spec: OptimizerSpec) -> None:
        self.parameters = parameters
        self.state = {"first_moments": zeros_like(parameters), "second_moments": zeros_like(parameters)}
        self._beta1 = or_default(spec.beta1, BETA1)
        self._beta2 = or_default(spec.beta2, BETA2)
        self._epsilon = or_default(spec.epsilon, EPSILON)

    def apply(self, group: Group, step: Step) -> None:
        """See Rule."""
        torch._fused_adamw_(
            group.parameters,
            group.gradients,
            [self.state["first_moments"][name] for name in group.names],
            [self.state["second_moments"][name] for name in group.names],
            [],
            [step.updates] * len(group.names),
            amsgrad=False,
            lr=step.learning_rate,
            beta1=0.0 if group.is_smoothed else self._beta1,
            beta2=self._beta2,
            weight_decay=group.weight_decay,
            eps=self._epsilon,
            maximize=False,
            grad_scale=step.divisor,
            found_inf=step.is_bad,
        )
