"""Control: a small network that advises the blocks, and a bound on how far one step may move them."""

from pylon_trainer.control.control import Control, build_control

__all__ = ["Control", "build_control"]
