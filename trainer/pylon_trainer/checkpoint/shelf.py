"""The places where a job's checkpoints lie: the nodes' own disks and the store. What is read or written there, and
when, is not decided here."""

from __future__ import annotations

from dataclasses import dataclass

from pylon_api.run import RunConfig
from pylon_api.training import CheckpointSpec
from pylon_trainer.checkpoint.archive import Archive
from pylon_trainer.checkpoint.storage import Storage


@dataclass(frozen=True, slots=True)
class Shelf:
    """One place where checkpoints lie, as this rank sees it."""

    archive: Archive
    is_shared: bool
    """Whether every rank sees the same there: a store, and not a node's own disk."""
    lists: bool
    """Whether this rank looks for the others: rank 0 in a store, the first rank of each node on its disk."""
    is_own: bool = True
    """Whether it is this job's, so that damage may be noted there."""


def shelves_of(config: RunConfig, spec: CheckpointSpec, rank: int) -> list[Shelf]:
    """Where a job's checkpoints lie, as one of its ranks sees it, the nearest first."""
    shelves = []
    if spec.local is not None and config.local_checkpoint_directory is not None:
        archive = Archive(Storage(config.local_checkpoint_directory), config.attempt, spec.local.keep)
        shelves.append(Shelf(archive, is_shared=False, lists=rank % config.processes_per_node == 0))
    if config.checkpoint_directory is not None:
        archive = Archive(Storage(config.checkpoint_directory), config.attempt, spec.keep)
        shelves.append(Shelf(archive, is_shared=True, lists=rank == 0))
    return shelves
