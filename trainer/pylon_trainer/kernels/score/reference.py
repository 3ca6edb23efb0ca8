"""Scores of rows of logits in plain PyTorch: the definition that the Triton kernel is held to.

Shapes: N rows (tokens), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pylon_trainer.step import IGNORED


@dataclass(frozen=True, slots=True)
class Scores:
    """What one look at each row's distribution p = softmax(logits) tells. Every score is 0 where the label is ignored.

    A row with a logit that is NaN or infinite has unspecified scores and is counted in `nonfinite_rows`.
    """

    entropy_N: Tensor
    """float32, nats: -sum p ln p."""
    margin_N: Tensor
    """float32: largest probability minus second largest."""
    loss_N: Tensor
    """float32, nats: -ln p[label]."""
    confidence_N: Tensor
    """float32: largest probability."""
    logsumexp_N: Tensor
    """float32: ln sum e^logit, which turns a recomputed logit back into a probability."""
    gradient_norm_N: Tensor
    """float32: |p - onehot(label)|_2, the norm of the loss's gradient with respect to the logits."""
    nonfinite_rows: Tensor
    """int32 scalar on the rows' device: labelled rows with a NaN or infinite logit; the step should then be skipped."""

    @classmethod
    def unpack(cls, scores_6N: Tensor, nonfinite_rows: Tensor) -> Scores:
        """From one tensor that holds the scores in the order of the fields."""
        entropy_N, margin_N, loss_N, confidence_N, logsumexp_N, gradient_norm_N = scores_6N
        return cls(entropy_N, margin_N, loss_N, confidence_N, logsumexp_N, gradient_norm_N, nonfinite_rows)

    def per_row(self) -> tuple[Tensor, ...]:
        """The scores in the order of the fields."""
        return (
            self.entropy_N,
            self.margin_N,
            self.loss_N,
            self.confidence_N,
            self.logsumexp_N,
            self.gradient_norm_N,
        )

    def take(self, rows_K: Tensor) -> Scores:
        """The scores of chosen rows. Rows that are not finite stay counted, chosen or not."""
        return Scores.unpack(torch.stack(self.per_row())[:, rows_K], self.nonfinite_rows)

    @classmethod
    def join(cls, parts: list[Scores]) -> Scores:
        """Scores of chunks of rows, one chunk after the other."""
        scores_6N = torch.cat([torch.stack(part.per_row()) for part in parts], dim=1)
        return cls.unpack(scores_6N, torch.stack([part.nonfinite_rows for part in parts]).sum(dtype=torch.int32))


class CrossEntropy(NamedTuple):
    """The part of the scores that a loss needs; the fields are those of Scores."""

    loss_N: Tensor
    logsumexp_N: Tensor
    nonfinite_rows: Tensor

    @classmethod
    def join(cls, parts: list[CrossEntropy]) -> CrossEntropy:
        """That of chunks of rows, one chunk after the other."""
        return cls(
            torch.cat([part.loss_N for part in parts]),
            torch.cat([part.logsumexp_N for part in parts]),
            torch.stack([part.nonfinite_rows for part in parts]).sum(dtype=torch.int32),
        )


def score(logits_NV: Tensor, labels_N: Tensor) -> Scores:
    """Score every row of logits against its label."""
    labelled_N = labels_N != IGNORED
    logits_NV = logits_NV.float()
    label_N1 = labels_N.where(labelled_N, 0).unsqueeze(1)
    log_p_NV, loss_N, logsumexp_N, nonfinite_rows = _cross_entropy(logits_NV, labelled_N, label_N1)
    p_NV = log_p_NV.exp()
    # In place from here on, as each new N x V costs as much as a pass.
    entropy_N = -log_p_NV.mul_(p_NV).sum(dim=1)
    # The largest is blanked while the next is looked for.
    top_N1, place_N1 = p_NV.max(dim=1, keepdim=True)
    runner_up_N = p_NV.scatter_(1, place_N1, -1.0).amax(dim=1).clamp_min(0.0)
    p_NV.scatter_(1, place_N1, top_N1)
    # The label's entry is lowered before squaring: 1 - 2 p + sum p^2 would cancel where the model is sure.
    gradient_norm_N = p_NV.scatter_add_(1, label_N1, -torch.ones_like(top_N1)).norm(dim=1)
    top_N = top_N1.squeeze(1)

    def labelled(score_N: Tensor) -> Tensor:
        return score_N.where(labelled_N, 0.0)

    return Scores(
        entropy_N=labelled(entropy_N),
        margin_N=labelled(top_N - runner_up_N),
        loss_N=labelled(loss_N),
        confidence_N=labelled(top_N),
        logsumexp_N=labelled(logsumexp_N),
        gradient_norm_N=labelled(gradient_norm_N),
        nonfinite_rows=nonfinite_rows,
    )


def cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> CrossEntropy:
    """The loss of every row alone, for a fraction of the passes."""
    labelled_N = labels_N != IGNORED
    label_N1 = labels_N.where(labelled_N, 0).unsqueeze(1)
    _, loss_N, logsumexp_N, nonfinite_rows = _cross_entropy(logits_NV.float(), labelled_N, label_N1)
    return CrossEntropy(loss_N.where(labelled_N, 0.0), logsumexp_N.where(labelled_N, 0.0), nonfinite_rows)


def _cross_entropy(logits_NV: Tensor, labelled_N: Tensor, label_N1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logarithms of the probabilities, loss, logsumexp, and the number of labelled rows that are not finite."""
    log_p_NV = torch.log_softmax(logits_NV, dim=1)
    loss_N = -log_p_NV.gather(1, label_N1).squeeze(1)
    logsumexp_N = logits_NV.gather(1, label_N1).squeeze(1) + loss_N
    # amax and amin pass a NaN on.
    finite_N = logits_NV.amax(dim=1).isfinite() & logits_NV.amin(dim=1).isfinite()
    return log_p_NV, loss_N, logsumexp_N, (labelled_N & ~finite_N).sum(dtype=torch.int32)
