"""What Sophia learns of the curvature: every few steps, the gradient of labels that the model draws itself.

Their distribution is the model's own, so the mean square of their gradients is the Gauss-Newton diagonal of the loss,
which squared gradients of the data's labels are not. It costs a forward pass to draw, and a forward and backward pass
of all tokens, gated or not. The sum over ranks is exact. After the update, so that nothing of a save is under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from pylon_api.training import OptimizerName, TrainingSpec
from pylon_trainer.consensus.exact import ExactExchange
from pylon_trainer.gating import build_plain_step
from pylon_trainer.gating.step import PlainStep
from pylon_trainer.models import Decoder, Resonate
from pylon_trainer.models.resonate.codebook import Codebook
from pylon_trainer.optim.optimizer import Optimizer, named_gradients
from pylon_trainer.runtime.distributed import World
from pylon_trainer.step import Batch

INTERVAL_STEPS = 10
"""Between two looks, as the paper has it."""


class Curvature:
    """Tells the optimizer, at its intervals."""

    def __init__(
        self,
        plain_step: PlainStep,
        exchange: ExactExchange,
        optimizer: Optimizer,
        parameters: dict[str, torch.nn.Parameter],
        codebook: Codebook | None,
        interval_steps: int,
    ) -> None:
        self._plain_step, self._exchange, self._optimizer = plain_step, exchange, optimizer
        self._parameters, self._codebook, self._interval_steps = parameters, codebook, interval_steps

    def follow(self, parts: Sequence[Batch], global_tokens: int, step: int) -> None:
        """After this many updates, with the micro-batches of the last. Collective; leaves no gradients, and counts no
        use of a codebook, as training on these tokens has."""
        if step % self._interval_steps:
            return
        with self._codebook.uncounted() if self._codebook else nullcontext():
            for part in parts:
                drawn = self._plain_step.draw_labels(part)
                self._plain_step.forward_backward(drawn, global_tokens=global_tokens, step=step)
        self._exchange.exchange(named_gradients(self._parameters))
        self._optimizer.observe_drawn(global_tokens)
        for parameter in self._parameters.values():
            parameter.grad = None


def build_curvature(
    world: World,
    training: TrainingSpec,
    model: Decoder,
    optimizer: Optimizer,
    parameters: dict[str, torch.nn.Parameter],
) -> Curvature | None:
    """None: this optimizer does not want it."""
    if training.optimizer.name is not OptimizerName.SOPHIA:
        return None
    plain_step = build_plain_step(model, training, world.device)
    interval_steps = training.optimizer.curvature_steps or INTERVAL_STEPS
    codebook = model.codebook if isinstance(model, Resonate) else None
    return Curvature(plain_step, ExactExchange(world), optimizer, parameters, codebook, interval_steps)
