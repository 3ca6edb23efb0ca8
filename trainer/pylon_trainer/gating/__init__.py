"""Training steps: plain, and with confidence-gated gradients."""

from __future__ import annotations

import torch

from pylon_api.training import (
    Compile,
    GatingGranularity,
    GatingSelection,
    GatingStrategy,
    Precision,
    Recompute,
    TrainingSpec,
)
from pylon_trainer.gating.replay import Replay, run_at_once
from pylon_trainer.gating.sequence import SequenceStep
from pylon_trainer.gating.step import GatedStep, PlainStep
from pylon_trainer.models import Decoder
from pylon_trainer.step import TrainingStep

__all__ = ["build_plain_step", "build_step"]


def build_step(model: Decoder, training: TrainingSpec, device: torch.device) -> TrainingStep:
    """The step that `training` asks for, around a model that is already on `device`.

    Autocast, compilation of the blocks and what they compute again are the step's own business; the caller need not
    wrap anything.
    """
    if training.compile is not Compile.OFF:
        for block in model.blocks:
            block.compile()
    model.recomputes_blocks = training.recompute is Recompute.BLOCKS
    precision = _precision(training)
    gating = training.gating
    # Top rows of random scores come from a generator on the device, whose seed a recording would keep.
    draws_on_device = gating.strategy is GatingStrategy.RANDOM and gating.selection is GatingSelection.TOP
    records = training.compile is Compile.GRAPH and device.type == "cuda" and not draws_on_device
    run = Replay(model.parameters()) if records else run_at_once
    if gating.strategy is GatingStrategy.OFF:
        return PlainStep(model, device, precision, run)
    kind = SequenceStep if gating.granularity is GatingGranularity.SEQUENCE else GatedStep
    return kind(model, device, precision, training, run)


def build_plain_step(model: Decoder, training: TrainingSpec, device: torch.device) -> PlainStep:
    """One that leaves out no token and records nothing, whatever `training` asks for, beside its own step."""
    return PlainStep(model, device, _precision(training))


def _precision(training: TrainingSpec) -> torch.dtype | None:
    """Of autocast."""
    return torch.bfloat16 if training.precision is Precision.BFLOAT16 else None
