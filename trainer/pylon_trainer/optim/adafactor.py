"""Adafactor: second moments of matrices by row and column (Shazeer & Stern 2018, arXiv 1804.04235).

The rule of torch.optim.Adafactor with its defaults, which is the reference in the tests. That one reads several numbers
of each tensor back to the host in each step, and cannot leave a bad step out on the device. Steps are relative to the
size of the weights, so learning rates are larger than AdamW's. It has no first moment.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pylon_api.training import OptimizerSpec
from pylon_trainer.optim.rule import Group, Step

DECAY_POWER = -0.8
"""Share of the newest gradient in the second moments, as a power of the number of the update."""
SMALLEST_SIZE = 1e-3
"""Root mean square that parameters have at least, when steps are made relative to it."""
LARGEST_RMS = 1.0
"""Root mean square that a direction has at most, parameter by parameter."""


class Adafactor:
    """See Rule."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], spec: OptimizerSpec) -> None:  # noqa: ARG002
        self.parameters = parameters
        matrices = {name: p for name, p in parameters.items() if p.dim() > 1}
        self.state = {
            "row_moments": {name: torch.zeros_like(p[..., :1]) for name, p in matrices.items()},
            "column_moments": {name: torch.zeros_like(p[..., :1, :]) for name, p in matrices.items()},
            "second_moments": {name: torch.zeros_like(p) for name, p in parameters.items() if name not in matrices},
        }

    def apply(self, group: Group, step: Step) -> None:
        """See Rule."""
        step.clip(group.gradients)
        share = step.updates.clamp(min=1) ** DECAY_POWER
        rate = step.updates.clamp(min=1).rsqrt().clamp(max=step.learning_rate)
        for batch in group.batches():
            gradients_S = torch.stack(batch.gradients)  # S parameters of one shape
            directions_S = self._estimate(batch.names, gradients_S, share, step)
            tiny = torch.finfo(directions_S.dtype).eps
            directions_S.clamp_(min=tiny * tiny).rsqrt_().mul_(gradients_S)
            values = batch.parameters[0].numel()
            sizes_S = torch.stack(torch._foreach_norm(batch.parameters)) / math.sqrt(values)
            rms_S = torch.linalg.vector_norm(directions_S.view(len(gradients_S), -1), dim=1) / math.sqrt(values)
            rates_S = rate * sizes_S.clamp(min=SMALLEST_SIZE) / (rms_S / LARGEST_RMS).clamp(min=1)
            directions_S.mul_(rates_S.view(-1, *[1] * (directions_S.dim() - 1)))
            step.move(batch.parameters, list(directions_S.unbind()), 1.0, step.learning_rate * batch.weight_decay)

    def _estimate(self, names: list[str], gradients_S: Tensor, share: Tensor, step: Step) -> Tensor:
        """Second moments of all values, after this gradient."""
        if gradients_S.dim() < 3:  # vectors
            moments = [self.state["second_moments"][name] for name in names]
            step.blend(moments, list(gradients_S.square().unbind()), share)
            return torch.stack(moments)
        rows = [self.state["row_moments"][name] for name in names]
        columns = [self.state["column_moments"][name] for name in names]
        for moments, dim in ((rows, -1), (columns, -2)):
            norms_S = torch.linalg.vector_norm(gradients_S, dim=dim, keepdim=True)
            step.blend(moments, list((norms_S.square() / gradients_S.shape[dim]).unbind()), share)
        rows_S = torch.stack(rows)
        tiny = torch.finfo(rows_S.dtype).eps
        return (rows_S / rows_S.mean(-2, keepdim=True).clamp(min=tiny)) * torch.stack(columns)
