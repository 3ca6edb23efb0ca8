"""Networks, each built from a `ModelSpec`."""

from pylon_trainer.models.transformer import Transformer, build_model

__all__ = ["Transformer", "build_model"]
