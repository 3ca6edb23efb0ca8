"""The gated step that leaves out whole sequences, before they have run through the model.

It spares forward pass as well as backward, for every token of a sequence that the router (router.py) finds easy. The
price is that nobody knows the loss of those sequences: what the step reports is estimated from the chosen ones.

Shapes: B sequences of T tokens, K of them chosen.
"""

from __future__ import annotations

from pylon_trainer.gating.ratio import PLAIN
from pylon_trainer.gating.router import router_layers, score_sequences
from pylon_trainer.gating.step import GatedStep
from pylon_trainer.step import IGNORED, Batch, StepResult


class SequenceStep(GatedStep):
    """A share of the sequences runs, each with the weight that the gate gives it."""

    def forward_backward(self, batch: Batch, *, global_tokens: int, step: int) -> StepResult:
        """As TrainingStep has it, but for loss_sum: the mean loss of the chosen sequences, by their weights, times the
        number of all labelled tokens."""
        ratio = self._gate.begin(step)
        if ratio == PLAIN and not self._gate.needs_scores:
            return self._plain(batch, global_tokens)[0]
        gating = self._training.gating
        layers = router_layers(gating, len(self.model.blocks))
        head = self._head()
        seen = score_sequences(
            self.model, head, batch, layers=layers, strategy=gating.strategy, autocast=self._autocast
        )
        labelled_B1 = seen.labelled_B[:, None]
        self._gate.count_nonfinite(seen.nonfinite_rows)
        self._gate.observe(seen.scores_B, seen.gradient_norm_B, labelled_B1, seen.nonfinite_rows)
        if ratio == PLAIN:
            return self._plain(batch, global_tokens)[0]
        rows_K, weights_K = self._gate.choose(seen.scores_B, labelled_B1, ratio, self._gate.draw())
        chosen = batch.take(rows_K)
        weights_KT = weights_K[:, None] * (chosen.labels_BT != IGNORED)
        result, _ = self._plain(chosen, global_tokens, weights_N=weights_KT.flatten())
        tokens = (batch.labels_BT != IGNORED).sum()
        loss_sum = result.loss_sum / weights_KT.sum().clamp_min(1) * tokens
        return StepResult(loss_sum, tokens, result.tokens, result.nonfinite_rows)
