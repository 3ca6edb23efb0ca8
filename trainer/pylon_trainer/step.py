"""The one interface between the training loop and what it trains.

Every architecture, gated or plain, is a `TrainingStep`; the loop in train.py knows nothing else about it.

Shapes: B sequences of this rank's micro-batch, T tokens of a sequence, D hidden width, V vocabulary, N = B * T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pylon_api.run import GateReport

IGNORED = -100
"""Label of a token that carries no loss, as PyTorch's cross entropy has it."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's sequences of one step. Labels are already shifted: labels_BT[b, t] follows tokens_BT[b, t]."""

    tokens_BT: Tensor
    """int64 token ids."""
    labels_BT: Tensor
    """int64 next tokens, IGNORED where there is none to learn."""
    documents_BT: Tensor | None = None
    """int32 number of the document within its sequence, from 0 and rising, when documents are isolated."""

    def split(self, sequences: int) -> list[Batch]:
        """Micro-batches of at most this many sequences."""
        documents_BT = self.documents_BT
        return [
            Batch(
                self.tokens_BT[start : start + sequences],
                self.labels_BT[start : start + sequences],
                None if documents_BT is None else documents_BT[start : start + sequences],
            )
            for start in range(0, len(self.tokens_BT), sequences)
        ]

    def take(self, rows_K: Tensor) -> Batch:
        """The sequences at these places."""
        documents_BT = None if self.documents_BT is None else self.documents_BT[rows_K]
        return Batch(self.tokens_BT[rows_K], self.labels_BT[rows_K], documents_BT)

    def to(self, device: torch.device) -> Batch:
        """The same on a device, copied without blocking."""
        return Batch(
            self.tokens_BT.to(device, non_blocking=True),
            self.labels_BT.to(device, non_blocking=True),
            None if self.documents_BT is None else self.documents_BT.to(device, non_blocking=True),
        )


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one forward and backward gave, as device tensors, so that reading them can wait."""

    loss_sum: Tensor
    """float32 scalar: cross entropy summed over every labelled token, gated or not, nats; NaN when nonfinite_rows is
    not 0."""
    tokens: Tensor
    """int64 scalar: labelled tokens."""
    gated_tokens: Tensor
    """int64 scalar: tokens that carried gradient."""
    nonfinite_rows: Tensor
    """int32 scalar: labelled tokens with a logit that is NaN or infinite. If there are any, gradients are NaN, so that
    the optimizer skips the step on all ranks."""
    difficulty: Tensor | None = None
    """What gating.difficulty.measure gave, or None when no token was scored."""


class TrainingStep(Protocol):
    """A model with its gate."""

    @property
    def model(self) -> torch.nn.Module:
        """The network whose parameters receive the gradients."""
        ...

    def forward_backward(self, batch: Batch, *, global_tokens: int, step: int) -> StepResult:
        """Add to the parameters' gradients those of sum(loss) / global_tokens over this micro-batch.

        global_tokens: labelled tokens of the whole step over all ranks and micro-batches, so that gradients summed over
        ranks are the gradient of the mean loss. Never waits for the device.
        """
        ...

    def evaluate(self, batch: Batch) -> StepResult:
        """The loss alone, without gradients."""
        ...

    def sense(self, batch: Batch, advice: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss of a micro-batch, gated or not, and its gradient at what the blocks are advised (a leaf that
        the model reads). No parameter is part of the graph."""
        ...

    def report(self) -> GateReport | None:
        """What the gate is doing, from figures that have reached the host already; None without a gate.

        The same on every rank. Read at log intervals.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """State of the gate that a resumed run needs (not the model's). Collective; any rank's serves all."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what state_dict gave."""
        ...
