"""RESONATE's network: state-space blocks whose work per token does not grow with the sequence."""

from pylon_trainer.models.resonate.model import Resonate

__all__ = ["Resonate"]
