"""Control as a run lives it: every step under a limit, and at the end of each turn the controller learns and speaks.

Two learners, and neither writes to what is the other's. In every step the optimizer moves the model, to which advice
is a constant. Once in a turn of `outerEverySteps` steps the controller learns from how the loss of one micro-batch
answers to advice: in that pass the whole model is frozen and advice is its only variable, so there is nothing else
that a gradient could reach. (The inner and the outer problem of bilevel optimisation, the outer at a thirtieth of the
inner's rate.) Ranks gather their figures, sum the gradient at the advice, which has far fewer numbers than the
controller has parameters, and then compute alike.

What is seen in one turn is read on the host in the next, so that no step waits for the device.

Shapes: K ranks, S figures of one, P kinds of ports, R size of the advice, G groups of tensors (limit.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pylon_api.run import ControlReport
from pylon_api.training import ControlSpec, OptimizerSpec, TrainingSpec
from pylon_trainer.control.controller import Controller
from pylon_trainer.control.decisions import CHECK_STEPS, HELD_TURNS, Belief, Promise
from pylon_trainer.control.limit import Limit, Moved
from pylon_trainer.models import Decoder
from pylon_trainer.models.ports import PortKind
from pylon_trainer.models.resonate import Resonate
from pylon_trainer.optim.optimizer import Optimizer
from pylon_trainer.runtime.arrivals import Arrival
from pylon_trainer.runtime.distributed import World
from pylon_trainer.step import Batch, StepResult, TrainingStep

OUTER_RATE = 1 / 30
"""The controller's learning rate as a share of the model's: slow, so that the model has answered before it goes on."""

CHECK_SHARE = 0.1
"""Norm of the change of advice whose effect is checked, as a share of the advice's."""


class Sensed(NamedTuple):
    """How the loss of one micro-batch answers to advice."""

    loss: Tensor
    gradient_PR: Tensor
    predicted: Tensor
    """Change of the loss by the change of advice that was tried, to first order; 0 when none was."""
    seen: Tensor


class Control:
    """Of one run."""

    def __init__(
        self,
        spec: ControlSpec,
        world: World,
        model: Decoder,
        training_step: TrainingStep,
        parameters: dict[str, torch.nn.Parameter],
    ) -> None:
        advice_PR = model.get_buffer("advice_PR")
        self._every = spec.outer_every_steps
        self._world, self._training_step = world, training_step
        self._advice_PR = advice_PR
        self._parameters = parameters
        self._limit = Limit(parameters)
        self._codebook = model.codebook if isinstance(model, Resonate) else None
        size = 3 + 2 * self._limit.groups
        self._controller = Controller(size, spec.vector_size).to(world.device)
        weights = dict(self._controller.named_parameters())
        self._weights = weights
        self._optimizer = Optimizer(weights, OptimizerSpec(weight_decay=0))
        self._belief = Belief(gains=(1.0,) * len(PortKind))
        self._unusual_KS = torch.zeros(1, size, device=world.device)
        """What the advice in force follows from."""
        self._seen: tuple[int, Arrival] | None = None
        """Step and figures of the last turn, which are still to be judged."""
        self._say()

    @contextmanager
    def around_update(
        self, step: int, batch: Batch, results: Sequence[StepResult], learning_rate: float
    ) -> Iterator[None]:
        """Watch the exchange of gradients and the update of a step, which go inside. Collective.

        batch: a micro-batch of this step. results: of all of them, whose gradients this rank's parameters hold.
        """
        is_turn = step % self._every == 0
        if is_turn:
            self._judge()
            sensed = self._sense(step, batch)
            gradients = [p.grad.clone() for p in self._parameters.values() if p.grad is not None]
        before = self._limit.remember()
        yield
        limit = torch.full((), self._belief.limit, device=self._world.device)  # unlike torch.tensor, without waiting
        moved = self._limit.apply(before, limit)
        if is_turn:
            self._turn(step, batch, results, learning_rate, sensed, gradients, moved)

    def hold(self, step: int) -> None:
        """Leave advice as it is for a while: a part of the model has begun anew, and what the loss says of that is not
        to be taken for an answer to advice. To be called alike on all ranks."""
        self._belief = self._belief.hold(step, HELD_TURNS * self._every)

    def _judge(self) -> None:
        """Draw conclusions from the last turn."""
        if self._seen is None:
            return
        step, figures = self._seen
        ratio, step_predicted, loss, step_seen, check_predicted, check_seen = figures.wait()
        self._belief = self._belief.after_step(Promise(step_predicted, step_seen, loss), ratio)
        if (port := self._port_checked(step)) is not None:
            checked = Promise(check_predicted, check_seen, loss)
            self._belief = self._belief.after_check(port, checked, step, self._every)

    def _port_checked(self, step: int) -> int | None:
        """The kind of port whose advice a turn changes for a look at what it does."""
        turn, turns = step // self._every, max(1, CHECK_STEPS // self._every)
        return turn // turns % len(PortKind) if turn % turns == 0 else None

    def _sense(self, step: int, batch: Batch) -> Sensed:
        """Ask the model, which is as it was before, and so is the advice."""
        advice_PR = self._advice_PR
        loss, gradient_PR = self._training_step.sense(batch, advice_PR)
        predicted = seen = torch.zeros_like(loss)
        if (port := self._port_checked(step)) is not None:
            advice_R, gradient_R = advice_PR[port].clone(), gradient_PR[port]
            downhill_R = -torch.nn.functional.normalize(gradient_R, dim=0)
            change_R = CHECK_SHARE * advice_R.norm() * downhill_R
            advice_PR[port] += change_R
            predicted, seen = gradient_R @ change_R, self._loss(batch) - loss
            advice_PR[port] = advice_R
        return Sensed(loss, gradient_PR, predicted, seen)

    def _loss(self, batch: Batch) -> Tensor:
        """Mean over a micro-batch, nats."""
        result = self._training_step.evaluate(batch)
        return result.loss_sum / result.tokens.clamp_min(1)

    def _turn(
        self,
        step: int,
        batch: Batch,
        results: Sequence[StepResult],
        learning_rate: float,
        sensed: Sensed,
        gradients: list[Tensor],
        moved: Moved,
    ) -> None:
        """Share what was seen, learn, and speak."""
        predicted = torch.stack([g.flatten() @ m.flatten() for g, m in zip(gradients, moved.steps, strict=True)]).sum()
        means = torch.stack([sensed.loss, self._loss(batch) - sensed.loss, sensed.predicted, sensed.seen])
        by_port = zip(self._belief.gains, sensed.gradient_PR.unbind(), strict=True)
        gradient_R = torch.stack([gain * at_port_R for gain, at_port_R in by_port]).sum(0)
        # This rank's parameters hold its share of the gradient of the mean; all else is a mean of its own.
        own = torch.cat([predicted[None], torch.cat([means, gradient_R]) / self._world.size])
        changes, gradient_R = self._world.sum(own).tensor_split([1 + len(means)])
        self._seen = step, Arrival.of(torch.cat([moved.ratio_G.max()[None], changes]))
        if step >= self._belief.held_until:
            self._learn(gradient_R, learning_rate)
            self._listen(results, gradients, moved)
            self._say()

    def _learn(self, gradient_R: Tensor, learning_rate: float) -> None:
        """Move the controller so that its advice goes downhill. gradient_R: of the loss, each port's by its gain."""
        with torch.enable_grad():
            downhill = self._controller(self._unusual_KS) @ gradient_R
        received = torch.autograd.grad(downhill, list(self._weights.values()))
        for weight, gradient in zip(self._weights.values(), received, strict=True):
            weight.grad = gradient
        self._optimizer.update(OUTER_RATE * learning_rate)

    def _listen(self, results: Sequence[StepResult], gradients: list[Tensor], moved: Moved) -> None:
        """Gather every rank's figures: loss, share of tokens with gradient, use of the codebook, norms of its own
        gradient, sizes of the update."""
        loss_sum, tokens, gated_tokens = (
            torch.stack([part.double() for part in parts]).sum()
            for parts in zip(*((r.loss_sum, r.tokens, r.gated_tokens) for r in results), strict=True)
        )
        use = loss_sum.new_ones(()) if self._codebook is None else self._codebook.use_entropy().double()
        shares = torch.stack([loss_sum / tokens, gated_tokens / tokens, use]).float()
        norms_G = self._limit.norms(gradients)
        figures_S = torch.cat([shares, norms_G, moved.ratio_G]).log()
        self._unusual_KS = self._controller.compare(self._world.all_gather(figures_S))

    @torch.no_grad()
    def _say(self) -> None:
        self._advice_PR.copy_(self._controller(self._unusual_KS).expand_as(self._advice_PR))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What ranks have alike, by name."""
        return {
            "advice": self._advice_PR,
            **{f"controller's {name}": weight for name, weight in self._controller.state_dict().items()},
            **{f"controller's {name}": moment for name, moment in self._optimizer.tensors.items()},
        }

    @property
    def turn_bytes(self) -> int:
        """Bytes that a rank sends in a turn, and as many that it receives, beside those of the step."""
        ranks = self._world.size
        summed_bytes = 4 * (5 + self._advice_PR.shape[1])  # what the loss did, in five numbers, and its gradient
        gathered_bytes = 4 * self._unusual_KS.shape[1]
        return 2 * summed_bytes * (ranks - 1) // ranks + gathered_bytes * (ranks - 1)

    def report(self) -> ControlReport:
        """What control is doing. The same on every rank. Waits for nothing."""
        belief = self._belief
        return ControlReport(
            update_limit=belief.limit,
            update_ratio=belief.ratio,
            kept_promise=belief.kept,
            mlp_gain=belief.gains[PortKind.MLP],
            skip_gain=belief.gains[PortKind.SKIP],
            hyper_gain=belief.gains[PortKind.HYPER],
            checks=belief.checks,
            wrong_signs=belief.wrong_signs,
            held_until_step=belief.held_until,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, but for the advice, which the model has. The same on all ranks. Not copies."""
        seen = None if self._seen is None else {"step": self._seen[0], "figures": self._seen[1].figures}
        return {
            "controller": self._controller.state_dict(),
            "optimizer": self._optimizer.tensors,
            "belief": self._belief.to_state(),
            "unusual": self._unusual_KS,
            "seen": seen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what state_dict gave, on any number of ranks."""
        device = self._world.device
        self._controller.load_state_dict(state["controller"])
        for name, tensor in self._optimizer.tensors.items():
            tensor.copy_(state["optimizer"][name])
        self._belief = Belief.from_state(state["belief"])
        self._unusual_KS = state["unusual"].to(device)
        seen = state["seen"]
        self._seen = None if seen is None else (seen["step"], Arrival.of(seen["figures"].to(device)))


def build_control(
    world: World,
    training: TrainingSpec,
    model: Decoder,
    training_step: TrainingStep,
    parameters: dict[str, torch.nn.Parameter],
) -> Control | None:
    """The control that a spec asks for, at the first step; None when it asks for none. Draws the controller's weights
    from torch's global random state."""
    own = training.model.resonate
    if own is None or own.control is None:
        return None
    return Control(own.control, world, model, training_step, parameters)
