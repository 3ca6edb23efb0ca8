"""Training steps: plain, and with confidence-gated gradients."""

from __future__ import annotations

import torch

from pylon_api.training import Compile, GatingGranularity, GatingStrategy, Precision, TrainingSpec
from pylon_trainer.gating.sequence import SequenceStep
from pylon_trainer.gating.step import GatedStep, PlainStep
from pylon_trainer.models import Transformer
from pylon_trainer.step import TrainingStep

__all__ = ["build_step"]


def build_step(model: Transformer, training: TrainingSpec, device: torch.device) -> TrainingStep:
    """The step that `training` asks for, around a model that is already on `device`.

    Autocast and compilation of the blocks are the step's own business; the caller need not wrap anything.
    """
    if training.compile is Compile.DEFAULT:
        for block in model.blocks:
            block.compile()
    precision = torch.bfloat16 if training.precision is Precision.BFLOAT16 else None
    if training.gating.strategy is GatingStrategy.OFF:
        return PlainStep(model, device, precision)
    kind = SequenceStep if training.gating.granularity is GatingGranularity.SEQUENCE else GatedStep
    return kind(model, device, precision, training)
