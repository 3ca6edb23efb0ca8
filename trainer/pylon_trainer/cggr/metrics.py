"""Metrics of a step, kept on the device until somebody asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pylon_trainer.kernels.score import Scores
from pylon_trainer.step import IGNORED


@dataclass(frozen=True)
class Metrics:
    """What the last forward pass saw and chose."""

    step: int
    ratio: float
    rows_K: Tensor
    labels_N: Tensor
    scores: Scores

    def read(self) -> dict[str, Any]:
        """Plain numbers, the means over labelled tokens. Waits for the device."""
        labelled_N = self.labels_N != IGNORED
        count = max(1, int(labelled_N.sum()))
        entropy = float(self.scores.entropy_N.sum()) / count
        confidence = float(self.scores.confidence_N.sum()) / count
        return {
            "step": self.step,
            "token_ratio": self.ratio,
            "tokens_selected": int(labelled_N[self.rows_K].sum()),
            "tokens_total": len(self.labels_N),
            "avg_confidence": confidence,
            "avg_entropy": entropy,
            "avg_difficulty": entropy - confidence,
        }
