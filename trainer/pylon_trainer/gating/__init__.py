"""Training steps: plain, and with confidence-gated gradients."""

from pylon_trainer.gating.step import build_step

__all__ = ["build_step"]
