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
    selected: Tensor
    """bool N or 0-d count: labelled tokens that carry loss."""
    labels_N: Tensor
    scores: Scores
    """Of the tokens that were scored."""

    def read(self) -> dict[str, Any]:
        """Plain numbers. Waits for the device."""
        return {
            "step": self.step,
            "token_ratio": self.ratio,
            "tokens_selected": int(self.selected.sum()),
            "tokens_total": int((self.labels_N != IGNORED).sum()),
            **means(self.scores),
        }


def means(scores: Scores) -> dict[str, float]:
    """Over the tokens that were scored; those without a label have no confidence. Waits for the device."""
    scored = max(1, int((scores.confidence_N > 0).sum()))
    entropy = float(scores.entropy_N.sum()) / scored
    confidence = float(scores.confidence_N.sum()) / scored
    return {"avg_confidence": confidence, "avg_entropy": entropy, "avg_difficulty": entropy - confidence}
