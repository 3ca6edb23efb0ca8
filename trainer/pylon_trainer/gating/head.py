"""The head of a step: scores of all rows, then loss and gradient of the rows that carry it, in chunks of rows.

The pass is cut at the hidden states, so that the logits of a large vocabulary never live at once and the blocks below
are somebody else's business.

Shapes: N = B * T tokens of a micro-batch, K of them chosen, D hidden width, V vocabulary, C rows of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

from pylon_trainer.gating.scores import Score
from pylon_trainer.models import Transformer
from pylon_trainer.step import IGNORED

LOGITS_PER_CHUNK = 2**25
"""Logits of one chunk: 128 MiB in float32, enough rows to keep a GPU busy at any vocabulary."""


class Head:
    """From hidden states to what the step needs of them."""

    def __init__(self, model: Transformer, autocast: Callable[[], AbstractContextManager[object]]) -> None:
        self._model = model
        self._autocast = autocast

    @torch.no_grad()
    def judge(self, hidden_ND: Tensor, labels_N: Tensor, judges: list[Score]) -> list[Tensor]:
        """What each judge says of every row, from the logits without gradient; 0 where there is no label."""
        rows = self._rows_per_chunk()
        verdicts: list[list[Tensor]] = []
        for hidden_CD, labels_C in zip(hidden_ND.split(rows), labels_N.split(rows), strict=True):
            logits_CV = self._logits(hidden_CD)
            labelled_C = labels_C != IGNORED
            known_C = labels_C.clamp_min(0)
            verdicts.append([torch.where(labelled_C, judge(logits_CV, known_C), 0.0) for judge in judges])
        return [torch.cat(parts) for parts in zip(*verdicts, strict=True)]

    def backward(
        self, hidden_KD: Tensor, labels_K: Tensor, weights_K: Tensor, global_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """Adds to the gradients of the head's parameters; returns the weighted loss and the gradient at the rows,
        K x D."""
        rows = self._rows_per_chunk()
        loss_sum = weights_K.new_zeros(())
        gradients = []
        for hidden_CD, labels_C, weights_C in zip(
            hidden_KD.split(rows), labels_K.split(rows), weights_K.split(rows), strict=True
        ):
            leaf_CD = hidden_CD.detach().requires_grad_()
            losses_C = F.cross_entropy(self._logits(leaf_CD), labels_C, ignore_index=IGNORED, reduction="none")
            loss = (losses_C * weights_C).sum()
            (loss / max(global_tokens, 1)).backward()
            loss_sum += loss.detach()
            assert leaf_CD.grad is not None
            gradients.append(leaf_CD.grad)
        return loss_sum, torch.cat(gradients)

    def _logits(self, hidden_CD: Tensor) -> Tensor:
        with self._autocast():
            return self._model.head(hidden_CD).float()

    def _rows_per_chunk(self) -> int:
        return max(1, LOGITS_PER_CHUNK // self._model.vocab_size)
