"""The output head with its scores and losses in plain PyTorch: the definition that the fused path is held to.

Shapes: N rows (tokens), H hidden width, V vocabulary, K chosen rows, C columns of a chunk of logits.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from pylon_trainer.kernels.score import reference
from pylon_trainer.kernels.score.reference import CrossEntropy, Scores
from pylon_trainer.step import IGNORED


def score(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Scores:
    """Scores of the rows of hidden @ weight^T."""
    return reference.score(hidden_NH @ weight_VH.T, labels_N)


def cross_entropy(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> CrossEntropy:
    """Losses of the rows of hidden @ weight^T."""
    return reference.cross_entropy(hidden_NH @ weight_VH.T, labels_N)


def selected_cross_entropy(
    hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, rows_K: Tensor, weights_K: Tensor
) -> Tensor:
    """Weighted sum of the chosen rows' losses, by autograd through their logits."""
    logits_KV = (hidden_NH[rows_K] @ weight_VH.T).float()
    return weights_K @ F.cross_entropy(logits_KV, labels_N[rows_K], ignore_index=IGNORED, reduction="none")


def logit_gradient_(logits_KC: Tensor, logsumexp_K: Tensor, labels_K: Tensor, weights_K: Tensor) -> None:
    """Turn logits in place into weight * (softmax - onehot). A label outside [0, C) belongs to another chunk."""
    gradient_KC = logits_KC.float().sub_(logsumexp_K.unsqueeze(1)).exp_()
    columns = logits_KC.shape[1]
    here_K = (labels_K >= 0) & (labels_K < columns)
    gradient_KC.scatter_add_(1, labels_K.clamp(0, columns - 1).unsqueeze(1), -here_K.float().unsqueeze(1))
    logits_KC.copy_(gradient_KC.mul_(weights_K.unsqueeze(1)))
