"""Word that attempts leave in the store: that they have begun, and which checkpoints they know of.

A newer attempt's claim ends the commits of older ones that still run. The names in it are hints for those that come
after, because a listing may not show yet what is there. Whether a name is a checkpoint is not decided here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from pylon_trainer.checkpoint.storage import Storage
from pylon_trainer.errors import PeerLost

CLAIMS = "attempts"
"""The directory of all claims."""

_CLAIM = re.compile(r"attempt-(?P<attempt>\d{6})")
_LOOK_BACK = 8
"""Attempts, this one included, whose claims are looked for even when they are not listed. Each takes over the hints of
those before it, so several tell more than one only when an older attempt committed after a newer one began."""


class Claims:
    """All attempts' claims, as one attempt sees them."""

    def __init__(self, storage: Storage, attempt: int) -> None:
        self._storage = storage
        self._attempt = attempt

    def write(self, names: Iterable[str]) -> None:
        """This attempt's own claim, in place of what it held."""
        self._storage.write(_path(self._attempt), "".join(f"{name}\n" for name in names).encode())

    def read(self) -> Iterator[tuple[int, list[str]]]:
        """Attempts and what their claims hold, newest first. A damaged claim may hold anything."""
        latest = range(self._attempt, max(0, self._attempt - _LOOK_BACK), -1)
        for attempt in sorted({*latest, *self._listed()}, reverse=True):
            try:
                content = self._storage.read(_path(attempt))
            except FileNotFoundError:
                continue
            yield attempt, content.decode(errors="replace").splitlines()

    def refuse_if_superseded(self) -> None:
        """PeerLost when a newer attempt has begun."""
        newest = max([self._attempt, *self._listed()])
        if newest == self._attempt and self._storage.size(_path(self._attempt + 1)) is not None:
            newest += 1  # the listing lags
        if newest > self._attempt:
            raise PeerLost(f"attempt {newest} has begun, so attempt {self._attempt} commits nothing more")

    def remove_older(self) -> None:
        """After this attempt's first commit, which its own claim names."""
        for older in (attempt for attempt in self._listed() if attempt < self._attempt):
            self._storage.remove(_path(older))

    def _listed(self) -> list[int]:
        return [int(match["attempt"]) for match in map(_CLAIM.fullmatch, self._storage.names(CLAIMS)) if match]


def _path(attempt: int) -> str:
    return f"{CLAIMS}/attempt-{attempt:06d}"
