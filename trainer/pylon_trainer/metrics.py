"""The status as Prometheus metrics, made at the scrape from the one status there is."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from pylon_api.base import Report
from pylon_api.run import (
    CheckpointReport,
    ControlReport,
    DifficultyReport,
    GateDecision,
    GateReport,
    Histogram,
    SaveReport,
    TrainerPhase,
    TrainerStatus,
)

if TYPE_CHECKING:
    from pylon_trainer.status import Board

_GAUGES = {
    "step": "Optimizer steps done.",
    "total_steps": "Optimizer steps to do.",
    "loss": "Training loss over the last log interval, nats per token.",
    "held_out_loss": "Held-out loss, nats per token.",
    "tokens_per_second": "Tokens per second over all ranks, last log interval.",
    "bytes_per_step": "Bytes that rank 0 exchanged per step, the larger of sent and received, median of the last log"
    " interval.",
    "bytes_per_step_peak": "The most of any step of this attempt.",
    "step_seconds": "Mean seconds per step over the last log interval.",
}

_GATE_GAUGES = {
    "ratio": "Share of tokens that carries gradient; 1 in a plain step.",
    "retained_mass": "Share of all tokens' gradient norm that the hardest of them hold, as many as carry gradient.",
    "effective_token_share": "Plain tokens that one token of a gated batch is worth for the gradient's variance.",
    "saved_flops_ratio": "Share of a plain step's floating-point operations that a step spares.",
}

_CONTROL_GAUGES = {
    "update_limit": "Largest update of a block in one step that is let through, as a share of its weights.",
    "update_ratio": "Largest update of a block in the last step looked at, as a share of its weights.",
    "kept_promise": "Share of the loss change predicted for a step that was seen.",
    "mlp_gain": "Seen over predicted changes of the loss by advice at the ports to the MLPs.",
    "skip_gain": "The same at the ports to the state-space layers' skips.",
    "hyper_gain": "The same at the ports to the hyper-networks.",
}

_CONTROL_COUNTERS = {
    "checks": "Changes of advice that were tried.",
    "wrong_signs": "Of those, how many moved the loss the other way than predicted.",
}

_CHECKPOINT_GAUGES = {
    "step": "Step of the newest committed checkpoint.",
    "size_bytes": "Bytes of all files of the newest committed checkpoint.",
}

_SAVE_GAUGES = {
    "failed_in_row": "Checkpoints given up since the last commit.",
    "stall_seconds": "Seconds that the last checkpoint kept training from going on.",
    "write_seconds": "Seconds from the beginning of the last committed checkpoint to its commit.",
    "interval_steps": "Steps between checkpoints by the interval now in force.",
}

_SAVE_COUNTERS = {
    "committed": "Checkpoints committed.",
    "failed": "Checkpoints given up because a store or disk refused them.",
    "put_off": "Checkpoints that had to wait for those before them.",
}


class StatusCollector(Collector):
    """Metrics named pylon_trainer_<field>; fields that are not known yet are left out."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def collect(self) -> Iterator[Metric]:
        """One scrape."""
        status = self._board.status
        yield from _progress(status)
        if status.checkpoint is not None:
            yield from _checkpoint(status.checkpoint)
        if status.saves is not None:
            yield from _saves(status.saves)
        if status.gate is not None:
            yield from _gate(status.gate)
        if status.control is not None:
            yield from _control(status.control)
        if status.difficulty is not None:
            yield from _difficulty(status.difficulty)


def _progress(status: TrainerStatus) -> Iterator[Metric]:
    yield from _gauges("pylon_trainer", _GAUGES, status)
    yield CounterMetricFamily("pylon_trainer_tokens", "Tokens trained on.", value=status.tokens)
    description = "Steps whose update was left out because logits or gradients were not finite."
    yield CounterMetricFamily("pylon_trainer_skipped_steps", description, value=status.skipped_steps)
    description = "Times that ranks whose weights differed were given rank 0's."
    yield CounterMetricFamily("pylon_trainer_healed_replicas", description, value=status.healed_replicas)
    phases = GaugeMetricFamily("pylon_trainer_phase", "1 for what the trainer is doing.", labels=["phase"])
    for phase in TrainerPhase:
        phases.add_metric([phase.value], float(phase is status.phase))
    yield phases


def _checkpoint(checkpoint: CheckpointReport) -> Iterator[Metric]:
    """The newest committed one; dashboards make its age from the time."""
    yield from _gauges("pylon_trainer_checkpoint", _CHECKPOINT_GAUGES, checkpoint)
    if checkpoint.committed_time is not None:
        name, description = "pylon_trainer_checkpoint_committed_timestamp_seconds", "When it was committed, Unix time."
        yield GaugeMetricFamily(name, description, value=checkpoint.committed_time.timestamp())


def _saves(saves: SaveReport) -> Iterator[Metric]:
    yield from _gauges("pylon_trainer_saves", _SAVE_GAUGES, saves)
    yield from _counters("pylon_trainer_saves", _SAVE_COUNTERS, saves)


def _control(control: ControlReport) -> Iterator[Metric]:
    yield from _gauges("pylon_trainer_control", _CONTROL_GAUGES, control)
    yield from _counters("pylon_trainer_control", _CONTROL_COUNTERS, control)


def _gate(gate: GateReport) -> Iterator[Metric]:
    yield from _gauges("pylon_trainer_gate", _GATE_GAUGES, gate)
    description = "Steps with logits that were infinite or not a number."
    yield CounterMetricFamily("pylon_trainer_gate_nonfinite_steps", description, value=gate.nonfinite_steps)
    decisions = GaugeMetricFamily("pylon_trainer_gate_decision", "1 for what the gate decided.", labels=["decision"])
    for decision in GateDecision:
        decisions.add_metric([decision.value], float(decision is gate.decision))
    yield decisions


def _difficulty(difficulty: DifficultyReport) -> Iterator[Metric]:
    description = "Norm of the loss's gradient at a token's logits, by tokens."
    yield _histogram("pylon_trainer_token_gradient_norm", description, difficulty.gradient_norm)
    description = "Entropy of a token's prediction, nats, by tokens."
    yield _histogram("pylon_trainer_token_entropy_nats", description, difficulty.entropy)


def _gauges(prefix: str, descriptions: dict[str, str], report: Report) -> Iterator[Metric]:
    for field, description in descriptions.items():
        value = getattr(report, field)
        if value is not None:
            yield GaugeMetricFamily(f"{prefix}_{field}", description, value=value)


def _counters(prefix: str, descriptions: dict[str, str], report: Report) -> Iterator[Metric]:
    for field, description in descriptions.items():
        yield CounterMetricFamily(f"{prefix}_{field}", description, value=getattr(report, field))


def _histogram(name: str, description: str, histogram: Histogram) -> Metric:
    bounds = [*map(str, histogram.bounds), "+Inf"]
    buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
    return HistogramMetricFamily(name, description, buckets=buckets, sum_value=histogram.sum)
