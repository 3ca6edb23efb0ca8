"""The exchange that a spec asks for."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pylon_api.training import ConsensusCodec, TrainingSpec
from pylon_trainer.consensus import Exchange
from pylon_trainer.consensus.compressed import CompressedExchange
from pylon_trainer.consensus.exact import ExactExchange
from pylon_trainer.consensus.local_steps import LocalSteps
from pylon_trainer.runtime.distributed import World


def build_exchange(
    world: World, training: TrainingSpec, parameters: Mapping[str, Tensor], other_bytes: int = 0
) -> Exchange:
    """For these parameters. One rank has nobody to spare bytes for, so its exchange is exact.

    other_bytes: of the budget, for control, which local steps refuse. ConfigError when the budget is too small.
    """
    spec = training.consensus
    if world.size == 1:
        return ExactExchange(world)
    if spec.local_steps > 1:
        return LocalSteps(world, spec, parameters)
    if spec.codec is ConsensusCodec.EXACT:
        return ExactExchange(world)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    return CompressedExchange(world, spec, shapes, training.seed, other_bytes)
