"""Scores of rows of logits in plain PyTorch: the definition that the Triton kernel is held to.

Shapes: N rows (tokens), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def score(logits_NV: Tensor, labels_N: Tensor) -> Scores:
    """Score every row of logits against its label."""
    labelled_N = labels_N != IGNORED
    logits_NV = logits_NV.float()
    label_N1 = labels_N.where(labelled_N, 0).unsqueeze(1)
    logsumexp_N = torch.logsumexp(logits_NV, dim=1)
    log_p_NV = logits_NV - logsumexp_N.unsqueeze(1)
    p_NV = log_p_NV.exp()
    loss_N = -log_p_NV.gather(1, label_N1).squeeze(1)
    top_N2 = p_NV.topk(min(2, p_NV.shape[1]), dim=1).values
    runner_up_N = top_N2[:, 1] if top_N2.shape[1] == 2 else torch.zeros_like(loss_N)
    finite_N = logits_NV.isfinite().all(dim=1)

    def labelled(score_N: Tensor) -> Tensor:
        return score_N.where(labelled_N, 0.0)

    return Scores(
        entropy_N=labelled(-(p_NV * log_p_NV).sum(dim=1)),
        margin_N=labelled(top_N2[:, 0] - runner_up_N),
        loss_N=labelled(loss_N),
        confidence_N=labelled(top_N2[:, 0]),
        logsumexp_N=labelled(logsumexp_N),
        gradient_norm_N=labelled(p_NV.scatter_add(1, label_N1, -torch.ones_like(p_NV[:, :1])).norm(dim=1)),
        nonfinite_rows=(labelled_N & ~finite_N).sum(dtype=torch.int32),
    )
