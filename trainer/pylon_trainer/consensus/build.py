"""The exchange that a spec asks for."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pylon_api.training import ConsensusCodec, TrainingSpec
from pylon_trainer.consensus import Exchange
from pylon_trainer.consensus.compressed import CompressedExchange
from pylon_trainer.consensus.exact import ExactExchange
from pylon_trainer.runtime.distributed import World


def build_exchange(world: World, training: TrainingSpec, parameters: Mapping[str, Tensor]) -> Exchange:
    """For the gradients of these parameters. One rank has nobody to spare bytes for, so its exchange is exact.

    ConfigError when the budget is too small.
    """
    if training.consensus.codec is ConsensusCodec.EXACT or world.size == 1:
        return ExactExchange(world)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    return CompressedExchange(world, training.consensus, shapes, training.seed)
