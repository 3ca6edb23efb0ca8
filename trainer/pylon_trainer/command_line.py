"""What the commands share that the trainer adds to `pylon`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from pylon_trainer.errors import TrainerError


@contextmanager
def errors_for_people() -> Iterator[None]:
    """An error that a person can act on becomes one line and exit code 1."""
    try:
        yield
    except TrainerError as error:
        raise click.ClickException(str(error)) from error
