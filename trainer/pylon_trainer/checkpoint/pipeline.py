"""The way of a rank's states from its tensors to commits: memory, copier, writer, and every place they go to.

Which states go, and when, is not decided here. Nothing here waits but for memory, when told to, and in `release`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pylon_api.training import CheckpointSpec
from pylon_trainer.checkpoint.destination import Destination, Outcome, Save
from pylon_trainer.checkpoint.manifest import PART_BYTES
from pylon_trainer.checkpoint.policy import Reach
from pylon_trainer.checkpoint.share import Divider
from pylon_trainer.checkpoint.shelf import Shelf
from pylon_trainer.checkpoint.slab import Slabs, default_budget_bytes
from pylon_trainer.checkpoint.staging import Staging
from pylon_trainer.checkpoint.writer_handle import WriterHandle
from pylon_trainer.errors import ConfigError, StorageError
from pylon_trainer.runtime.distributed import World

MAX_UNDER_WAY = 2
"""Saves on their way to one place; another waits, memory or not."""

GLANCE_SECONDS = 0.1
"""Between looks at the time that is left for waiting."""

Tree = Mapping[str, Any]


class Pipeline:
    """Of one rank. What concerns all places is done by all ranks alike."""

    def __init__(
        self,
        world: World,
        spec: CheckpointSpec,
        shelves: Sequence[Shelf],
        ranks_per_node: int,
        replicated: Tree,
        own: Tree,
    ) -> None:
        """Takes the memory for states like this one, and starts the writer. ConfigError when there is no memory."""
        self._world = world
        self._divider = Divider(world.rank, world.size)
        file_bytes = self._divider.share(replicated, own).layout.size_bytes
        budget_bytes = spec.host_memory_bytes or default_budget_bytes(ranks_per_node)
        try:
            self._slabs = Slabs.open(file_bytes, budget_bytes, PART_BYTES, world.device)
        except OSError as error:
            raise ConfigError(
                f"no host memory for checkpoints ({error.strerror}); lower training.checkpoint.hostMemoryBytes"
            ) from error
        self.notices = self._slabs.notices
        """What a person should know of how this rank saves."""
        self._writer = WriterHandle.open(self._slabs.arena, [shelf.archive.storage.uri for shelf in shelves])
        self._staging = Staging(world.device, self._slabs, self._writer)
        self._uploads = itertools.count()
        self._places = [Destination(world, self._writer, shelf) for shelf in shelves]

    @property
    def is_busy(self) -> bool:
        """Whether another save would have to wait."""
        return not self._slabs.has_free or any(place.under_way >= MAX_UNDER_WAY for place in self._places)

    @property
    def under_way(self) -> Reach:
        """How far the farthest goes of what is neither committed nor given up."""
        reaches = (Reach.STORE if place.is_store else Reach.NODES for place in self._places if place.under_way)
        return max(reaches, default=Reach.NOWHERE)

    def begin(
        self,
        step: int,
        name: str,
        replicated: Tree,
        own: Tree,
        reach: Reach,
        seconds_left: Callable[[], float | None] = lambda: None,
    ) -> None:
        """Begin to save a state, whose tensors must not be written before `release`.

        seconds_left: how much longer to wait for memory, then the save is given up; None for as long as it takes.
        """
        share = self._divider.share(replicated, own)
        save = Save(step, name, share.file, share.layout.size_bytes, share.replicated, share.own, time.monotonic())
        has_memory = self._wait_for_memory(seconds_left)
        places = [place for place in self._places if reach is Reach.STORE or not place.is_store]
        uploads = [next(self._uploads) for _ in places]
        for place, upload in zip(places, uploads, strict=True):
            place.begin(save, upload)
        if has_memory:
            save.staged = self._staging.begin(share.tensors, share.layout, uploads)
        else:
            save.error = StorageError("the checkpoints before it were not taken in time, so no memory was free for it")

    def _wait_for_memory(self, seconds_left: Callable[[], float | None]) -> bool:
        """False when the time ran out, which may begin to run while this waits."""
        while not self._staging.wait_for_slab(GLANCE_SECONDS):
            if seconds_left() == 0:
                return False
        return True

    def release(self) -> None:
        """Before the tensors are written: have that wait until they are copied."""
        self._staging.release()

    def votes(self) -> list[int]:
        """How far this rank is in every place, to be added up over all ranks and given to `advance`."""
        for end in self._writer.poll():
            for place in self._places:
                place.receive(end)
        return [vote for place in self._places for vote in place.votes()]

    def advance(self, sums: Sequence[int]) -> list[Outcome]:
        """Go on in every place; what ended there. Collective."""
        pairs = zip(self._places, sums[::2], sums[1::2], strict=True)
        return [outcome for place, done, failed in pairs if (outcome := place.heed(done, failed)) is not None]

    def abandon(self) -> None:
        """Give up all that is under way; what is half written stays for a later attempt to clean up."""
        for place in self._places:
            place.abandon()

    def close(self, timeout_seconds: float) -> None:
        """End the copier and the writer, and give the memory back. What is under way is lost."""
        has_ended = self._staging.close(timeout_seconds)
        self._writer.close(timeout_seconds)
        if has_ended:  # else a device that hangs may still copy there
            self._slabs.close()
