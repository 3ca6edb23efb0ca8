"""An Exchange that takes few bytes: every kind of tensor through a channel of its own, chosen by measurement.

On the first steps each codec's error is measured on what it would have to send, added up over ranks, and the channels
are chosen anew (budget.py); what one has kept its successor takes over. The budget holds from the first step on. A
sketch cannot be taken over and is as wide as the budget allows.
A gradient that is not finite on one rank is agreed upon before anything is encoded: all ranks then give the optimizer
gradients that are not, so that all skip the step, and what they keep stays as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from pylon_api.training import ConsensusCodec, ConsensusSpec
from pylon_trainer.consensus.budget import Choice, choose
from pylon_trainer.consensus.channel import Channel
from pylon_trainer.consensus.groups import Kind, group_by_kind
from pylon_trainer.consensus.offers import Catalogue
from pylon_trainer.runtime.distributed import World

CALIBRATION_STEPS = 4
DEFAULT_BYTES_PER_STEP = 2_000_000
CONTROL_BYTES = 4096
"""Of the budget, for what ranks say beside gradients: whether they are finite, tokens, stops, sums for the log."""


class CompressedExchange:
    """The sum over ranks of what gets through this step; what does not, later."""

    replicas: Mapping[str, Tensor] = MappingProxyType({})

    def __init__(
        self,
        world: World,
        spec: ConsensusSpec,
        shapes: Mapping[str, tuple[int, ...]],
        seed: int,
        other_bytes: int = 0,
    ) -> None:
        """shapes: of all gradients, by name. seed: of the sketches' hashes, the same on all ranks. other_bytes: of the
        budget, beside CONTROL_BYTES, for whoever else sends.

        ConfigError when the spec's budget is too small for any codec.
        """
        self._world, self._spec, self._control_bytes = world, spec, CONTROL_BYTES + other_bytes
        catalogue = Catalogue(world, spec, seed)
        self._groups = {group.kind: group for group in group_by_kind(shapes)}
        self._offers = {
            kind: {offer.channel.name: offer for offer in catalogue.offers(group)}
            for kind, group in self._groups.items()
        }
        self._figures = {kind: [0.0] * (1 + len(offered)) for kind, offered in self._offers.items()}
        """Squared norm of what was to be sent, and of what each offer would have left behind, over ranks and steps."""
        self._steps = 0
        self._channels: dict[Kind, Channel] = {}
        self._plan()

    @property
    def channels(self) -> dict[Kind, str]:
        """The channel of each kind of tensor, by name."""
        return {kind: channel.name for kind, channel in self._channels.items()}

    @property
    def bytes_per_step(self) -> int:
        """Bytes of gradients that a rank sends in a step, at most."""
        return sum(channel.bytes_per_step for channel in self._channels.values())

    @property
    def smoothed(self) -> frozenset[str]:
        """See Exchange."""
        with_momentum = (kind for kind, channel in self._channels.items() if channel.has_momentum)
        return frozenset(name for kind in with_momentum for name in self._groups[kind].shapes)

    def exchange(self, named_gradients: Mapping[str, Tensor]) -> None:
        """See Exchange."""
        gradients = {kind: group.flatten(named_gradients) for kind, group in self._groups.items()}
        is_skipped = self._any_not_finite(gradients)
        gradients = {kind: torch.where(is_skipped, 0, gradient_N) for kind, gradient_N in gradients.items()}
        if self._steps < CALIBRATION_STEPS and self._spec.codec is not ConsensusCodec.SKETCH:
            self._measure(gradients)
            self._plan()
        self._steps += 1
        for kind, gradient_N in gradients.items():
            sum_N = self._channels[kind].exchange(gradient_N, is_skipped)
            self._groups[kind].write(torch.where(is_skipped, torch.nan, sum_N), named_gradients)

    def after_update(self, *, is_last: bool) -> None:
        """Weights are alike."""

    def _any_not_finite(self, gradients: Mapping[Kind, Tensor]) -> Tensor:
        """Whether any gradient of any rank is NaN or infinite, bool scalar on the device."""
        bad = torch.stack([~gradient_N.isfinite().all() for gradient_N in gradients.values()])
        return self._world.maximum(bad.any().float()) > 0

    def _measure(self, gradients: Mapping[Kind, Tensor]) -> None:
        """Add this step's figures. Waits for the device."""
        rows = []
        for kind, gradient_N in gradients.items():
            kept_N = self._channels[kind].kept_N
            values_N = gradient_N if kept_N is None else gradient_N + kept_N
            norm, offered = _square(values_N), self._offers[kind].values()
            lost = {decoded: _square(values_N - decoded(values_N)) for decoded in {o.decoded: None for o in offered}}
            rows += [norm, *(norm - (norm - lost[offer.decoded]) / offer.every for offer in offered)]
        sums = iter(self._world.sum(torch.stack(rows)).tolist())
        self._figures = {kind: [old + next(sums) for old in figures] for kind, figures in self._figures.items()}

    def _plan(self) -> None:
        """Choose channels by the figures there are, and hand over what has been kept."""
        chosen = choose({kind: self._choices(kind) for kind in self._groups}, self._budget_bytes, self._control_bytes)
        for kind, choice in chosen.items():
            old = self._channels.get(kind)
            if old is None or old.name != choice.name:
                self._channels[kind] = self._offers[kind][choice.name].build(self._kept(kind))

    def _choices(self, kind: Kind) -> list[Choice]:
        norm, *lost = self._figures[kind]
        values = self._groups[kind].values
        choices = []
        for (name, offer), square in zip(self._offers[kind].items(), lost, strict=True):
            bytes_per_step = offer.channel.bytes_per_step
            share = square / norm if norm else values / (values + bytes_per_step)  # a guess, until it is measured
            choices.append(Choice(name, bytes_per_step, values * share))
        return choices

    def _kept(self, kind: Kind) -> Tensor | None:
        """What a new channel begins with."""
        if not self._spec.error_feedback:
            return None
        old = self._channels.get(kind)
        kept_N = None if old is None else old.kept_N
        return torch.zeros(self._groups[kind].values, device=self._world.device) if kept_N is None else kept_N

    @property
    def _budget_bytes(self) -> int | None:
        if self._spec.bytes_per_step is not None:
            return self._spec.bytes_per_step
        return DEFAULT_BYTES_PER_STEP if self._spec.codec.fills_budget else None

    def state_dict(self) -> dict[str, Any]:
        """See Exchange."""
        return {
            "steps": self._steps,
            "figures": {kind.value: figures for kind, figures in self._figures.items()},
            "channels": {kind.value: channel.state_dict() for kind, channel in self._channels.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See Exchange. What another kind of channel kept is taken over where both keep values, else dropped."""
        figures = state.get("figures", {})
        if any(len(figures.get(kind.value, ())) != len(known) for kind, known in self._figures.items()):
            return  # of another codec or model: begin anew
        self._figures = {kind: list(figures[kind.value]) for kind in self._figures}
        self._steps = state["steps"]
        self._plan()
        for kind, channel in self._channels.items():
            kept = state["channels"][kind.value]
            if kept.keys() == channel.state_dict().keys():
                channel.load_state_dict(kept)


def _square(values_N: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values_N, dtype=torch.float64)
    return norm * norm
