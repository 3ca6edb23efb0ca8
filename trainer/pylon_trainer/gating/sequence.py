"""The gated step that leaves out whole sequences, before they have run through the model.

It spares forward pass as well as backward, for every token of a sequence that the router (router.py) finds easy. The
price is that nobody knows the loss of those sequences: what the step reports is estimated from the chosen ones. Refuses
micro-batches of so few sequences that none could be left out.

Shapes: B sequences of T tokens, K of them chosen.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from pylon_api.training import BatchSpec, RatioControl, TrainingSpec
from pylon_trainer.errors import ConfigError
from pylon_trainer.gating.ratio import PLAIN, rows_of
from pylon_trainer.gating.replay import Runner, run_at_once
from pylon_trainer.gating.router import router_layers, score_sequences
from pylon_trainer.gating.step import GatedStep
from pylon_trainer.models import Decoder
from pylon_trainer.step import IGNORED, Batch, StepResult


class SequenceStep(GatedStep):
    """A share of the sequences runs, each with the weight that the gate gives it."""

    def __init__(
        self,
        model: Decoder,
        device: torch.device,
        precision: torch.dtype | None,
        training: TrainingSpec,
        run: Runner = run_at_once,
    ) -> None:
        """ConfigError when the ratio leaves out no sequence of a micro-batch."""
        super().__init__(model, device, precision, training, run)
        self._sequences = micro_sequences(training.batch)
        gating = training.gating
        if gating.ratio_control is RatioControl.FIXED:
            field, ratio = "tokenRatio", gating.token_ratio
        else:
            field, ratio = "minimumTokenRatio", gating.minimum_token_ratio
        if ratio < PLAIN and rows_of(ratio, self._sequences) == self._sequences:
            raise ConfigError(
                f"training.gating.{field} {ratio:g} leaves out none of the {self._sequences} sequence(s) of a "
                f"micro-batch: raise training.batch.microSequences (or batch.sequences) or use granularity Token"
            )

    def forward_backward(self, batch: Batch, *, global_tokens: int, step: int) -> StepResult:
        """As TrainingStep has it, but for loss_sum: the mean loss of the chosen sequences, by their weights, times the
        number of all labelled tokens."""
        ratio = self._gate.begin(step)
        result = self._run_chosen(batch, max(global_tokens, 1), ratio)
        self._gate.count_nonfinite(result.nonfinite_rows)
        return result

    def _run_chosen(self, batch: Batch, global_tokens: int, ratio: float) -> StepResult:
        head = self._head()
        if ratio == PLAIN and not self._gate.needs_scores:
            return self._plain(batch, global_tokens, head=head)[0]
        gating = self._training.gating
        layers = router_layers(gating, len(self.model.blocks))
        seen = score_sequences(
            self.model, head, batch, layers=layers, strategy=gating.strategy, autocast=self._autocast
        )
        labelled_B1 = seen.labelled_B[:, None]
        self._gate.observe(seen.scores_B, seen.gradient_norm_B, labelled_B1, seen.nonfinite_rows)
        if ratio == PLAIN:
            return self._plain(batch, global_tokens, head=head)[0]
        rows_K, weights_K = self._gate.choose(seen.scores_B, labelled_B1, ratio, self._gate.draw())
        chosen = batch.take(rows_K)
        weights_KT = weights_K[:, None] * (chosen.labels_BT != IGNORED)
        result, _ = self._plain(chosen, global_tokens, weights_N=weights_KT.flatten(), head=head)
        tokens = (batch.labels_BT != IGNORED).sum()
        loss_sum = result.loss_sum / weights_KT.sum().clamp_min(1) * tokens
        return StepResult(loss_sum, tokens, result.tokens, result.nonfinite_rows)

    def _share(self, ratio: float) -> float:
        # Of few sequences, whole ones are much more than the ratio asks for.
        return rows_of(ratio, self._sequences) / self._sequences


def micro_sequences(batch: BatchSpec) -> int:
    """Sequences of a forward pass of this process."""
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    share = batch.sequences // processes
    return min(batch.micro_sequences or share, share)
