"""CGGRLoss: cross entropy of the tokens that a gate chooses, on logits or, fused, on hidden states and head weight.

On logits only the loss's own backward pass shrinks; the model's costs what it costs. On hidden states logits are never
written, and of the head's backward pass the chosen rows alone are left. What shrinks the whole step is CGGRModel.

Shapes: B sequences, T tokens, N = B * T, K chosen rows, V vocabulary, D hidden width.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pylon_api.training import GatingSelection
from pylon_trainer.cggr.counter import CountingModule
from pylon_trainer.cggr.metrics import Metrics
from pylon_trainer.cggr.options import gating_of
from pylon_trainer.gating.gate import Draws, Gate, build_gate
from pylon_trainer.gating.ratio import PLAIN, rows_of
from pylon_trainer.gating.scores import judge
from pylon_trainer.gating.selection import Selection, all_rows, select
from pylon_trainer.kernels import head
from pylon_trainer.kernels.score import Scores, score
from pylon_trainer.step import IGNORED


class CGGRLoss(CountingModule):
    """Selective cross entropy. Call `step()` after `optimizer.step()`.

    scoring: entropy, margin, loss, combined, difficulty, gradient_norm or random. selection: topk, stratified,
    sequence_aware, fixed_quota (topk at a fixed ratio) or sampled (unbiased). dynamic_threshold: let the ratio follow
    the gradient mass by up to threshold_sensitivity of itself. base_loss: loss per row of logits; None: cross entropy.

    Raises ValueError for names and numbers that cannot be.
    """

    def __init__(
        self,
        scoring: str = "combined",
        selection: str = "topk",
        dynamic_threshold: bool = True,
        threshold_sensitivity: float = 0.5,
        min_tokens_ratio: float = 0.25,
        warmup_steps: int = 1000,
        num_strata: int = 4,
        min_tokens_per_sequence: int = 1,
        base_loss: nn.Module | None = None,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min_tokens_per_sequence < 0:
            raise ValueError(f"min_tokens_per_sequence: {min_tokens_per_sequence} must be at least 0")
        self._gating = gating_of(
            scoring=scoring,
            selection=selection,
            dynamic_threshold=dynamic_threshold,
            threshold_sensitivity=threshold_sensitivity,
            min_tokens_ratio=min_tokens_ratio,
            warmup_steps=warmup_steps,
            num_strata=num_strata,
        )
        self.scoring, self.selection = scoring, selection
        self.dynamic_threshold, self.threshold_sensitivity = dynamic_threshold, threshold_sensitivity
        self.min_tokens_ratio, self.warmup_steps = min_tokens_ratio, warmup_steps
        self.num_strata, self.min_tokens_per_sequence = num_strata, min_tokens_per_sequence
        self.base_loss = base_loss
        self._seed = seed
        self._gate: Gate | None = None
        self._metrics: Metrics | None = None

    def forward(self, logits: Tensor, targets: Tensor, head_weight: Tensor | None = None) -> Tensor:
        """Mean loss of the chosen rows, float32 scalar; 0 when no target is labelled.

        logits: B x T x V or N x V; with head_weight (V x D) hidden states B x T x D or N x D. targets: B x T or N,
        aligned with logits by the caller (not shifted here), -100 for none. Flat ones are one sequence.

        In evaluation mode all labelled rows count. Raises ValueError when shapes do not fit.
        """
        if logits.shape[:-1] != targets.shape:
            raise ValueError(f"targets {tuple(targets.shape)} must have the shape of logits {tuple(logits.shape)[:-1]}")
        if not logits.numel():
            raise ValueError(f"logits: shape {tuple(logits.shape)} holds nothing; leave empty batches out")
        if head_weight is not None and self.base_loss is not None:
            raise ValueError("head_weight: a base_loss of one's own needs logits; leave one of the two out")
        labels_BT = targets.reshape(-1, targets.shape[-1])
        rows_NX, labels_N = logits.flatten(0, -2), labels_BT.flatten()
        scores = self._score(rows_NX.detach(), labels_N, head_weight)
        selection, ratio = self._choose(scores, labels_BT != IGNORED)
        self._metrics = Metrics(self._steps, ratio, (labels_N != IGNORED)[selection.rows_K], labels_N, scores)
        weighted_sum = self._weighted_sum(rows_NX, labels_N, selection, head_weight, scores)
        is_biased = self._gating.selection is GatingSelection.TOP
        divisor = selection.weights_K.sum() if is_biased else (labels_N != IGNORED).sum()
        return weighted_sum / divisor.clamp_min(1)

    def get_metrics(self) -> dict[str, Any]:
        """Figures of the last forward pass, {} before it. Waits for the device, which forward does not."""
        figures = {} if self._metrics is None else self._metrics.read()
        return figures and {**figures, "selection": self.selection, "scoring": self.scoring}

    @property
    def metrics(self) -> dict[str, Any]:
        """As get_metrics()."""
        return self.get_metrics()

    def _score(self, rows_NX: Tensor, labels_N: Tensor, head_weight: Tensor | None) -> Scores:
        return score(rows_NX, labels_N) if head_weight is None else head.score(rows_NX, head_weight, labels_N)

    def _choose(self, scores: Scores, labelled_BT: Tensor) -> tuple[Selection, float]:
        """The rows that carry loss, and their share of all."""
        if not self.training:
            return all_rows(labelled_BT), PLAIN
        if self._gate is None:
            self._gate = build_gate(self._gating, seed=self._seed, device=labelled_BT.device)
        gate, scores_N = self._gate, judge(self._gating.strategy, scores)
        ratio = gate.begin(self._steps)
        gate.count_nonfinite(scores.nonfinite_rows)
        gate.observe(scores_N, scores.gradient_norm_N, labelled_BT, scores.nonfinite_rows)
        if ratio == PLAIN:
            return all_rows(labelled_BT), ratio
        if self._gating.selection is GatingSelection.SEQUENCE_AWARE:
            return self._choose_by_sequence(scores_N, labelled_BT, rows_of(ratio, len(scores_N)), gate.draw()), ratio
        return gate.choose(scores_N, labelled_BT, ratio, gate.draw()), ratio

    def _choose_by_sequence(self, scores_N: Tensor, labelled_BT: Tensor, rows: int, draws: Draws) -> Selection:
        """First the minimum of every sequence, then the rest by score."""
        share = min(1.0, self.min_tokens_per_sequence * len(labelled_BT) / rows)
        gating = self._gating.model_copy(update={"sequence_share": share})
        return select(gating, scores_N.view_as(labelled_BT), labelled_BT, rows=rows, start=draws.rows)

    def _weighted_sum(
        self, rows_NX: Tensor, labels_N: Tensor, selection: Selection, head_weight: Tensor | None, scores: Scores
    ) -> Tensor:
        rows_K, weights_K = selection.rows_K, selection.weights_K
        if head_weight is not None:
            return head.selected_cross_entropy(rows_NX, head_weight, labels_N, rows_K, weights_K, scores)
        logits_KV, labels_K = rows_NX.index_select(0, rows_K), labels_N[rows_K]
        losses_K: Tensor
        if self.base_loss is not None:
            losses_K = self.base_loss(logits_KV, labels_K)
            if losses_K.shape != labels_K.shape:
                raise ValueError(
                    f"base_loss: gives shape {tuple(losses_K.shape)} for {len(labels_K)} rows of logits, not one loss "
                    "per row; use reduction='none'"
                )
        else:
            losses_K = F.cross_entropy(logits_KV.float(), labels_K, ignore_index=IGNORED, reduction="none")
        return weights_K @ losses_K.float()
