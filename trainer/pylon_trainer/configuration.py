"""Reads the run's configuration and refuses what cannot work, before anything heavy is imported.

Looks at the configuration alone: data, devices and stores are checked by those who open them.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from pylon_api.manifest import describe
from pylon_api.run import RunConfig
from pylon_trainer.errors import ConfigError


def read_config(path: Path) -> RunConfig:
    """The run's configuration. ConfigError with one line when it is missing, malformed or cannot work."""
    try:
        config = RunConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        first, *others = describe(error)
        more = f" (and {len(others)} more)" if others else ""
        # The operator has checked it against these same models, if it has the same.
        raise ConfigError(f"{path}: {first}{more}; are operator and trainer image of one version of Pylon?") from error
    _check_batch(config)
    return config


def _check_batch(config: RunConfig) -> None:
    batch, processes = config.training.batch, config.world_size
    share, left = divmod(batch.sequences, processes)
    if left:
        raise ConfigError(
            f"training.batch.sequences {batch.sequences} must be divisible by the {processes} processes "
            f"({config.nodes} nodes x {config.processes_per_node} processes per node)"
        )
    if batch.micro_sequences is not None and share % batch.micro_sequences:
        raise ConfigError(
            f"training.batch.microSequences {batch.micro_sequences} must divide the {share} sequences of each process"
        )
