"""The head of a step: scores of all rows, then loss and gradient of the rows that carry it; logits are never kept.

The pass is cut at the hidden states, so that the blocks below are somebody else's business. All arithmetic is that of
`kernels.head`; this is where it meets parameters: the weight is multiplied out, if it is factorised, and cast to the
type of the products once for a micro-batch, and its gradient goes back the same way.

Shapes: N = B * T tokens of a micro-batch, K of them chosen, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from pylon_trainer.gating.gradients import Sink, go_back
from pylon_trainer.kernels import head
from pylon_trainer.kernels.score import CrossEntropy, Scores


class HeadOwner(Protocol):
    """A model, as the head sees it."""

    @property
    def head_weight(self) -> Tensor:
        """V x D: a parameter, or what was computed from parameters, with its graph."""
        ...

    def parameters(self) -> Iterator[Parameter]:
        """Those that the head's weight comes from, among others."""
        ...


class HeadResult(NamedTuple):
    """What the head's backward pass gave."""

    loss_sum: Tensor
    """float32 scalar: weighted sum of the rows' losses, nats; NaN when nonfinite_rows is not 0."""
    gradient_KD: Tensor
    """Of loss_sum / global_tokens, in the hidden states' type; NaN when nonfinite_rows is not 0."""
    nonfinite_rows: Tensor
    """int32 scalar: labelled rows with a logit that is NaN or infinite, of those that were looked at."""
    scores_K: Scores | None
    """The rows' scores, when they were given or asked for."""


class Head:
    """The head during one micro-batch; the next one opens its own, as parameters may have moved."""

    def __init__(self, model: HeadOwner, precision: torch.dtype | None) -> None:
        """precision: type of the products under autocast; None runs them in the parameters' own."""
        self._model = model
        device = next(iter(model.parameters())).device.type
        with torch.autocast(device, dtype=precision, enabled=precision is not None, cache_enabled=False):
            self._weight_VD = model.head_weight
        self._product_VD = self._weight_VD.detach().to(precision or self._weight_VD.dtype)

    def score(self, hidden_ND: Tensor, labels_N: Tensor) -> Scores:
        """Scores of every row."""
        return head.score(self._product_type(hidden_ND), self._product_VD, labels_N)

    def cross_entropy(self, hidden_ND: Tensor, labels_N: Tensor) -> CrossEntropy:
        """The loss of every row alone."""
        return head.cross_entropy(self._product_type(hidden_ND), self._product_VD, labels_N)

    def backward(
        self,
        hidden_KD: Tensor,
        labels_K: Tensor,
        weights_K: Tensor,
        global_tokens: float | Tensor,
        sink: Sink,
        scores_K: Scores | None = None,
        *,
        wants_scores: bool = False,
    ) -> HeadResult:
        """Loss and gradient of rows; gives the sink the gradients of the head's parameters.

        weights_K: float32. global_tokens: what the weighted sum is divided by to give the loss, 1 or more. scores_K:
        what `score` gave for these rows (`Scores.take`); without, losses and, if wanted, scores come from the same
        logits as the gradients, which costs a product less than scoring the rows first.
        """
        arguments = self._product_type(hidden_KD), self._product_VD, labels_K
        scale_K = weights_K / global_tokens
        wants_weight = self._weight_VD.requires_grad
        if scores_K is None:
            losses_K, gradient_KD, d_weight_VD, nonfinite_rows, scores_K = head.loss_gradients(
                *arguments, scale_K, wants_weight=wants_weight, wants_scores=wants_scores
            )
        else:
            losses_K, nonfinite_rows = scores_K.loss_N, scores_K.nonfinite_rows
            scale_K = scale_K * head.poison(nonfinite_rows)
            gradient_KD, d_weight_VD = head.known_gradients(
                *arguments, scale_K, scores_K.logsumexp_N, wants_weight=wants_weight
            )
        if d_weight_VD is not None:
            self._give(d_weight_VD, sink)
        loss_sum = weights_K @ losses_K * head.poison(nonfinite_rows)
        return HeadResult(loss_sum, gradient_KD.to(hidden_KD.dtype), nonfinite_rows, scores_K)

    def _product_type(self, hidden: Tensor) -> Tensor:
        return hidden.detach().to(self._product_VD.dtype)

    def _give(self, d_weight_VD: Tensor, sink: Sink) -> None:
        """The weight's gradient to its parameter, or on to the factors that it was multiplied from."""
        gradient_VD = d_weight_VD.to(self._weight_VD.dtype)
        if isinstance(self._weight_VD, Parameter):
            sink(self._weight_VD, gradient_VD)
        else:
            go_back(self._weight_VD, gradient_VD, list(self._model.parameters()), sink)
