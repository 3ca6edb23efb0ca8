"""Reads the newest whole checkpoint back, on any number of ranks, each of its files once and from the nearest place.

All ranks go through the same candidates, newest first. A file is read by a rank of a node whose own disk holds it, else
from the store by the ranks in turn; it is verified part by part before anything of it is used, and goes to the other
ranks over the network. A damaged file on a disk is read from the store instead; where that is damaged too, all ranks
pass on to the next older checkpoint together. What the state means is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pylon_api.run import CheckpointReport
from pylon_trainer.checkpoint.archive import Found, Place
from pylon_trainer.checkpoint.manifest import DamagedCheckpoint, FileEntry, Manifest, placeholders
from pylon_trainer.checkpoint.reading import empty_tensor, read_tensors
from pylon_trainer.checkpoint.shelf import Shelf
from pylon_trainer.checkpoint.state import join
from pylon_trainer.errors import StorageError
from pylon_trainer.runtime.distributed import World


@dataclass(frozen=True, slots=True)
class Restored:
    """A checkpoint whose tensors have been read."""

    report: CheckpointReport
    """With the URI in the store if it is there too."""
    is_in_store: bool
    """Whether it outlives the nodes."""
    manifest: Manifest
    replicated: dict[str, Any]
    own: list[dict[str, Any]]
    """What each rank had for itself. With as many ranks now, tensors are there for this rank alone; else for all."""


class _Lost(DamagedCheckpoint):
    """Files of it went with a node, and no store has it: nothing that was kept for good is lost. Told before any tensor
    is read."""


class _Copy(NamedTuple):
    """A place where a checkpoint, or a file of one, was found."""

    shelf: int
    rank: int


def restore(
    world: World,
    shelves: Sequence[Shelf],
    ranks_per_node: int,
    *,
    targets: Callable[[Manifest, str], Mapping[str, Tensor]],
    passed_over: Callable[[str], None],
    wanted: Callable[[Place], bool] = lambda _: True,
) -> Restored | None:
    """Read the newest whole checkpoint; None when there is none. Collective.

    shelves: the nearest first. targets: of a checkpoint's manifest and URI, the tensors to read into, by key,
    contiguous; others are made on the CPU. It raises when the checkpoint must not be read. passed_over: told, in one
    line each, of damage.
    StorageError when there are checkpoints but none is whole, because beginning anew would lose them silently; the
    targets may then hold anything. One of which a lost node had a part, and no store a copy, is none.
    """
    tried: set[Place] = set()
    damage = ""
    # Looked for again when all are used up: an attempt that still runs may have committed, and removed what was there.
    while fresh := [found for found in _find(world, shelves, wanted) if found[0] not in tried]:
        for place, copies in fresh:
            tried.add(place)
            try:
                return _Reader(world, shelves, ranks_per_node, place.name, copies, passed_over).read(targets)
            except _Lost as lost:
                passed_over(f"passed over {lost}")
            except DamagedCheckpoint as found:
                damage = str(found)
                passed_over(f"passed over {damage}")
    if damage:
        shelf = shelves[-1]
        advice = f"remove {shelf.archive.storage.uri} to begin anew" if shelf.is_own else "name another to start from"
        raise StorageError(f"no checkpoint is whole ({damage}); {advice}")
    return None


def _find(world: World, shelves: Sequence[Shelf], wanted: Callable[[Place], bool]) -> list[tuple[Place, list[_Copy]]]:
    """Committed checkpoints, newest first, each with its copies, nearest first. The same on every rank."""
    seen = [[place for place in _list(shelf) if wanted(place)] if shelf.lists else [] for shelf in shelves]
    copies: dict[Place, list[_Copy]] = {}
    for rank, by_shelf in enumerate(world.gather(seen)):
        for shelf, places in enumerate(by_shelf):
            for place in places:
                copies.setdefault(place, []).append(_Copy(shelf, rank))
    return [(place, sorted(copies[place])) for place in sorted(copies, reverse=True)]


def _list(shelf: Shelf) -> list[Place]:
    try:
        return [listed.place for listed in shelf.archive.checkpoints() if listed.is_committed]
    except StorageError:
        if shelf.is_shared:
            raise
        return []  # a disk that fails is no reason to give up


class _Reader:
    """Of one checkpoint. What it does is collective, and raises DamagedCheckpoint on all ranks alike."""

    def __init__(
        self,
        world: World,
        shelves: Sequence[Shelf],
        ranks_per_node: int,
        name: str,
        copies: Sequence[_Copy],
        passed_over: Callable[[str], None],
    ) -> None:
        self._world = world
        self._shelves = shelves
        self._ranks_per_node = ranks_per_node
        self._name = name
        self._copies = copies
        self._is_in_store = any(shelves[copy.shelf].is_shared for copy in copies)
        self._passed_over = passed_over

    def read(self, targets_of: Callable[[Manifest, str], Mapping[str, Tensor]]) -> Restored:
        """Everything, into the targets."""
        found = self._load_first()
        manifest, report = found.manifest, found.report
        if self._is_in_store:
            report = report.model_copy(update={"uri": self._uri(self._shelves[-1])})
        targets = targets_of(manifest, report.uri)
        readers = self._share_out(manifest)
        replicated = {place["key"]: place for place in placeholders(manifest.replicated)}
        tensors = {key: targets[key] if key in targets else empty_tensor(place) for key, place in replicated.items()}
        is_same_size = manifest.ranks == self._world.size
        own = [{p["key"]: p for p in placeholders(tree)} for tree in manifest.own]
        own_tensors: list[dict[str, Tensor]] = [{} for _ in own]
        for files in _rounds(readers, self._world.size):
            contents = self._read_round(manifest, files, readers)
            for file in files:
                source, content = readers[file].rank, contents.get(file)
                for key in _keys_of(file, replicated):
                    self._hand_out(tensors[key], source, content, key)
                for rank, places in enumerate(own):
                    takes_part = not is_same_size or self._world.rank in (source, rank)
                    for key in _keys_of(file, places) if takes_part else ():
                        tensor = empty_tensor(places[key])
                        self._hand_out(tensor, source, content, key, rank if is_same_size else None)
                        if rank == self._world.rank or not is_same_size:
                            own_tensors[rank][key] = tensor
        return Restored(
            report=report,
            is_in_store=self._is_in_store,
            manifest=manifest,
            replicated=join(manifest.replicated, tensors),
            own=[
                join(tree, tensors) if tensors else tree
                for tree, tensors in zip(manifest.own, own_tensors, strict=True)
            ],
        )

    def _load_first(self) -> Found:
        """The first copy whose manifest is whole."""
        damage = ""
        for copy in self._copies:
            loaded = self._load(self._shelves[copy.shelf]) if copy.rank == self._world.rank else ""
            found = self._world.broadcast(loaded, copy.rank)
            if isinstance(found, Found):
                return found
            damage = found
        raise DamagedCheckpoint(damage)

    def _load(self, shelf: Shelf) -> Found | str:
        """Or what is wrong with it."""
        try:
            return shelf.archive.load(self._name)
        except DamagedCheckpoint as damage:
            return f"{self._uri(shelf)}: {damage}"
        except StorageError as error:
            if shelf.is_shared:
                raise
            return str(error)  # as in _list

    def _uri(self, shelf: Shelf) -> str:
        return f"{shelf.archive.storage.uri}/{self._name}"

    def _share_out(self, manifest: Manifest) -> dict[str, _Copy]:
        """Who reads which file: a rank of a node that holds it, else from the store whoever's turn it is."""
        mine = [
            {file for file, entry in manifest.files.items() if not shelf.is_shared and self._holds(shelf, file, entry)}
            for shelf in self._shelves
        ]
        held: dict[str, list[_Copy]] = {file: [] for file in manifest.files}
        for rank, by_shelf in enumerate(self._world.gather(mine)):
            for shelf, files in enumerate(by_shelf):
                for file in files:
                    held[file].append(_Copy(shelf, rank))
        readers = {}
        for turn, (file, near) in enumerate(sorted(held.items())):
            if near:
                shelf, first_rank = near[turn % len(near)]
                readers[file] = _Copy(shelf, first_rank + turn % self._ranks_per_node)
            elif self._is_in_store:
                readers[file] = _Copy(len(self._shelves) - 1, turn % self._world.size)
            else:
                raise _Lost(f"{self._uri(self._shelves[0])}: no node holds {file}")
        return readers

    def _holds(self, shelf: Shelf, file: str, entry: FileEntry) -> bool:
        return shelf.lists and shelf.archive.storage.size(f"{self._name}/{file}") == entry.size_bytes

    def _read_round(
        self, manifest: Manifest, files: Sequence[str], readers: Mapping[str, _Copy]
    ) -> dict[str, dict[str, Tensor]]:
        """The tensors of that of these files which is this rank's to read; all ranks know then that theirs is whole."""
        contents: dict[str, dict[str, Tensor]] = {}
        damages: list[str] = []
        is_lost = False
        for file in (file for file in files if readers[file].rank == self._world.rank):
            content = self._read_file(file, manifest.files[file], readers[file].shelf, damages)
            is_lost = content is None
            contents |= {} if content is None else {file: content}
        everyone = self._world.gather((damages, is_lost))
        for damages, is_lost in everyone:
            if is_lost:
                raise DamagedCheckpoint(damages[-1])
        for damage in (damage for damages, _ in everyone for damage in damages):
            self._passed_over(f"read from the store instead of {damage}")
        return contents

    def _read_file(self, file: str, entry: FileEntry, nearest: int, damages: list[str]) -> dict[str, Tensor] | None:
        """From the nearest shelf that has it whole; None, with its damages, when none has."""
        for shelf in self._shelves[nearest:]:
            if shelf.is_shared and not self._is_in_store:
                continue
            try:
                return read_tensors(shelf.archive.storage, f"{self._name}/{file}", entry)
            except DamagedCheckpoint as damage:
                damages.append(f"{self._uri(shelf)}: {damage}")
                if shelf.is_own:
                    shelf.archive.condemn(self._name, str(damage))
            except StorageError as error:
                if shelf.is_shared:
                    raise
                damages.append(str(error))  # as in _list
        return None

    def _hand_out(
        self, target: Tensor, source: int, content: Mapping[str, Tensor] | None, key: str, taker: int | None = None
    ) -> None:
        """content: on the rank that has read the tensor. taker: the only one that needs it, for CPU tensors."""
        if content is not None:
            with torch.no_grad():
                target.copy_(content[key])
        if taker is not None:
            self._world.pass_tensor(target, source, taker)
        elif self._world.size > 1:
            self._world.broadcast_tensor(target, source)


def _rounds(readers: Mapping[str, _Copy], ranks: int) -> Iterator[list[str]]:
    """Files that are read at the same time: at most one by each rank, so that no rank holds two in memory."""
    queues: list[list[str]] = [[] for _ in range(ranks)]
    for file in sorted(readers):
        queues[readers[file].rank].append(file)
    for number in range(max(map(len, queues))):
        yield [queue[number] for queue in queues if number < len(queue)]


def _keys_of(file: str, places: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return sorted(key for key, place in places.items() if place["file"] == file)
