"""The status as Prometheus metrics, made at the scrape from the one status there is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pylon_api.run import TrainerPhase

if TYPE_CHECKING:
    from pylon_trainer.status import Board

_GAUGES = {
    "step": "Optimizer steps done.",
    "total_steps": "Optimizer steps to do.",
    "loss": "Training loss over the last log interval, nats per token.",
    "held_out_loss": "Held-out loss, nats per token.",
    "tokens_per_second": "Tokens per second over all ranks, last log interval.",
    "token_ratio": "Share of tokens that carried gradient in the last log interval.",
    "bytes_per_step": "Bytes that one rank exchanged per step, the larger of sent and received.",
    "step_seconds": "Median seconds per step over the last log interval.",
}


class StatusCollector(Collector):
    """Gauges named pylon_trainer_<field>; fields that are not known yet are left out."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def collect(self) -> Iterator[Metric]:
        """One scrape."""
        status = self._board.status
        for field, description in _GAUGES.items():
            value = getattr(status, field)
            if value is not None:
                yield GaugeMetricFamily(f"pylon_trainer_{field}", description, value=value)
        yield CounterMetricFamily("pylon_trainer_tokens", "Tokens trained on.", value=status.tokens)
        description = "Steps whose update was left out because gradients were not finite."
        yield CounterMetricFamily("pylon_trainer_skipped_steps", description, value=status.skipped_steps)
        if status.checkpoint is not None:
            description = "Step of the newest committed checkpoint."
            yield GaugeMetricFamily("pylon_trainer_checkpoint_step", description, value=status.checkpoint.step)
        phases = GaugeMetricFamily("pylon_trainer_phase", "1 for what the trainer is doing.", labels=["phase"])
        for phase in TrainerPhase:
            phases.add_metric([phase.value], float(phase is status.phase))
        yield phases
