"""Reads again what looks damaged: a network card, a proxy or a memory bank may spoil one read of a file that is whole.

What a store refuses is no damage, and not looked at here: Storage asks again by itself, then raises.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from pylon_trainer.checkpoint.manifest import DamagedCheckpoint
from pylon_trainer.checkpoint.storage import Storage

LOOKS = 3
"""As many as must all find damage."""

logger = logging.getLogger("pylon")

T = TypeVar("T")


def confirmed(storage: Storage, look: Callable[[], T]) -> T:
    """What a look at the store's bytes returns; DamagedCheckpoint once LOOKS looks in a row have raised it."""
    damage: DamagedCheckpoint | None = None
    for looks_left in reversed(range(LOOKS)):
        try:
            seen = look()
        except DamagedCheckpoint as error:
            if not looks_left:
                raise
            damage = error
            storage.reconnect()
        else:
            if damage is not None:
                logger.warning(f"{storage.uri}: {damage}; it was whole when read again")
            return seen
    raise AssertionError("the last look returns or raises")
