"""Errors that a person or the failure policy should understand, each with the exit code that the pod leaves with.

TrainerError
├── ConfigError        78  the configuration cannot work
│   └── SharedConfigError   and every rank has found that out
├── DataError          65  the data cannot be read or is empty
├── StorageError       74  a store or disk refused after retries
├── PeerLost           76  a peer died or fell silent
├── Stopped            75  asked to stop; saved and left
└── NonFiniteLoss      70  the loss is no number any more
"""

from __future__ import annotations

from typing import ClassVar

from pylon_api.names import ExitCode


class TrainerError(Exception):
    """Base of all. Its text is one line for a person: the field, the value, the fix."""

    exit_code: ClassVar[ExitCode] = ExitCode.INTERNAL


class ConfigError(TrainerError):
    """The configuration cannot work, here or anywhere."""

    exit_code = ExitCode.BAD_CONFIG


class SharedConfigError(ConfigError):
    """The configuration cannot work, and every rank raises this at the same place: none of them is lost."""


class DataError(TrainerError):
    """The data cannot be read, or there is none."""

    exit_code = ExitCode.BAD_DATA


class StorageError(TrainerError):
    """A store or disk refused a write or read after retries."""

    exit_code = ExitCode.STORAGE


class PeerLost(TrainerError):
    """Another rank died or fell silent, so no collective can end."""

    exit_code = ExitCode.PEER_LOST


class Stopped(TrainerError):
    """Asked to stop. The state was saved at a step that all ranks agreed on."""

    exit_code = ExitCode.STOPPED


class NonFiniteLoss(TrainerError):
    """The loss became NaN or infinite and stayed so."""
