"""The names that users of the published `cggr` library know, over Pylon's gate, head and engine.

    from pylon_trainer.cggr import CGGRLoss, CGGRModel, CGGRWrapper, create_truncated_router

Arguments, attributes and defaults are theirs; what they do is Pylon's. docs/huggingface.md lists the differences.
"""

from pylon_trainer.cggr.loss import CGGRLoss
from pylon_trainer.cggr.model import CGGRModel
from pylon_trainer.cggr.router import TruncatedRouter, create_truncated_router
from pylon_trainer.cggr.wrapper import CGGRWrapper

__all__ = ["CGGRLoss", "CGGRModel", "CGGRWrapper", "TruncatedRouter", "create_truncated_router"]
