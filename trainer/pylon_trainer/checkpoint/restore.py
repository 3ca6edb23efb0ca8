"""Reads the newest whole checkpoint back, on any number of ranks, each of its files once and from the nearest place.

All ranks go through the same candidates, newest first. A file is read by a rank of a node whose own disk holds it, else
from the store by the ranks in turn; it is verified part by part before anything of it is used, and goes to the other
ranks over the network. A damaged file on a disk is read from the store instead; where that is damaged too, all ranks
pass on to the next older checkpoint together. What the state means is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pylon_trainer.checkpoint.archive import Archive, Place
from pylon_trainer.checkpoint.layout import Layout
from pylon_trainer.checkpoint.manifest import DamagedCheckpoint, FileEntry, Manifest
from pylon_trainer.checkpoint.state import join, placeholders
from pylon_trainer.errors import StorageError
from pylon_trainer.runtime.distributed import World

_READERS = 4
"""Parts that one rank reads at the same time: one connection seldom fills a network."""


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


@dataclass(frozen=True, slots=True)
class Restored:
    """A checkpoint whose tensors have been read."""

    uri: str
    is_in_store: bool
    """Whether every rank can still read it when a node is gone."""
    manifest: Manifest
    replicated: dict[str, Any]
    own: dict[str, Any] | None
    """What this rank had for itself; None when the checkpoint is of another number of ranks."""


@dataclass(frozen=True, slots=True)
class _Read:
    """Who reads a file, and from which shelf."""

    rank: int
    shelf: int


def restore(
    world: World,
    shelves: Sequence[Shelf],
    ranks_per_node: int,
    targets: Mapping[str, Tensor],
    *,
    check: Callable[[Manifest, str], None],
    passed_over: Callable[[str], None],
    wanted: Callable[[Place], bool] = lambda _: True,
) -> Restored | None:
    """Read the newest whole checkpoint; None when there is none. Collective.

    shelves: the nearest first. targets: tensors to read into, by key, contiguous; others are made on the CPU.
    check: raises when a checkpoint must not be read into the targets. passed_over: told, in one line each, of damage.
    StorageError when there are checkpoints but none is whole, because beginning anew would lose them silently; the
    targets may then hold anything.
    """
    tried: set[Place] = set()
    damage = ""
    # Looked for again when all are used up: an attempt that still runs may have committed, and removed what was there.
    while fresh := [place for place in _list(world, shelves, wanted) if place not in tried]:
        for place in fresh:
            tried.add(place)
            try:
                return _Reader(world, shelves, ranks_per_node, place.name, passed_over).read(targets, check)
            except DamagedCheckpoint as found:
                damage = str(found)
                passed_over(f"passed over {damage}")
    if damage:
        raise StorageError(f"no checkpoint is whole ({damage}); remove {shelves[-1].archive.storage.uri} to begin anew")
    return None


def _list(world: World, shelves: Sequence[Shelf], wanted: Callable[[Place], bool]) -> list[Place]:
    seen = {
        listed.place
        for shelf in shelves
        if shelf.lists
        for listed in shelf.archive.checkpoints()
        if listed.is_committed and wanted(listed.place)
    }
    return sorted(set().union(*world.gather(seen)), reverse=True)


class _Reader:
    """Of one checkpoint. Every method is collective, and raises DamagedCheckpoint on all ranks alike."""

    def __init__(
        self,
        world: World,
        shelves: Sequence[Shelf],
        ranks_per_node: int,
        name: str,
        passed_over: Callable[[str], None],
    ) -> None:
        self._world = world
        self._shelves = shelves
        self._ranks_per_node = ranks_per_node
        self._name = name
        self._passed_over = passed_over

    def read(self, targets: Mapping[str, Tensor], check: Callable[[Manifest, str], None]) -> Restored:
        """Everything, into the targets."""
        shelf, manifest = self._manifest()
        uri = f"{self._shelves[shelf].archive.storage.uri}/{self._name}"
        check(manifest, uri)
        reads = self._share_out(manifest)
        replicated = {place["key"]: place for place in placeholders(manifest.replicated)}
        tensors = {key: targets[key] if key in targets else _empty(place) for key, place in replicated.items()}
        is_same_size = manifest.ranks == self._world.size
        own: dict[str, Tensor] = {}
        for files in _rounds(reads, self._world.size):
            contents = self._read_round(manifest, files, reads)
            for file in files:
                source, content = reads[file].rank, contents.get(file)
                for key in sorted(key for key, place in replicated.items() if place["file"] == file):
                    self._hand_out(tensors[key], source, content and content[key])
                for rank in range(manifest.ranks if is_same_size else 0):
                    for place in placeholders(manifest.own[rank]):
                        if place["file"] == file:
                            self._hand_out(tensor := _empty(place), source, content and content[place["key"]])
                            own |= {place["key"]: tensor} if rank == self._world.rank else {}
        return Restored(
            uri=uri,
            is_in_store=self._shelves[shelf].is_shared or self._is_on_shared_shelf(),
            manifest=manifest,
            replicated=join(manifest.replicated, tensors),
            own=join(manifest.own[self._world.rank], own) if is_same_size else None,
        )

    def _manifest(self) -> tuple[int, Manifest]:
        """The manifest, and the shelf of the first rank that has it whole."""
        holds = [shelf.lists and _is_committed(shelf.archive, self._name) for shelf in self._shelves]
        everyone = self._world.gather(holds)
        damages = []
        for shelf in range(len(self._shelves)):
            for rank in (rank for rank, held in enumerate(everyone) if held[shelf]):
                found: Manifest | str = ""
                if rank == self._world.rank:
                    found = self._load(self._shelves[shelf])
                found = self._world.broadcast(found, rank)
                if isinstance(found, Manifest):
                    return shelf, found
                damages.append(found)
        raise DamagedCheckpoint(damages[0] if damages else f"{self._name}: it was removed")

    def _load(self, shelf: Shelf) -> Manifest | str:
        try:
            return shelf.archive.load(self._name).manifest
        except DamagedCheckpoint as damage:
            return f"{shelf.archive.storage.uri}/{self._name}: {damage}"

    def _share_out(self, manifest: Manifest) -> dict[str, _Read]:
        """Who reads which file: a rank of a node that holds it, else whoever's turn it is, from the store."""
        held: dict[int, dict[str, list[int]]] = {}
        for number, shelf in enumerate(self._shelves):
            if not shelf.is_shared:
                mine = {file for file, entry in manifest.files.items() if shelf.lists and self._holds(shelf, file, entry)}
                everyone = self._world.gather(mine)
                held[number] = {file: [r for r, has in enumerate(everyone) if file in has] for file in manifest.files}
        is_shared = self._is_on_shared_shelf()
        reads: dict[str, _Read] = {}
        for turn, file in enumerate(sorted(manifest.files)):
            near = [(number, ranks[file][0]) for number, ranks in held.items() if ranks[file]]
            if near:
                number, first_rank = near[0]
                reads[file] = _Read(first_rank + turn % self._ranks_per_node, number)
            elif is_shared:
                reads[file] = _Read(turn % self._world.size, len(self._shelves) - 1)
            else:
                raise DamagedCheckpoint(f"{self._shelves[0].archive.storage.uri}/{self._name}: no node holds {file}")
        return reads

    def _holds(self, shelf: Shelf, file: str, entry: FileEntry) -> bool:
        return shelf.archive.storage.size(f"{self._name}/{file}") == entry.size_bytes

    def _is_on_shared_shelf(self) -> bool:
        shelf = self._shelves[-1]
        is_there = shelf.is_shared and shelf.lists and _is_committed(shelf.archive, self._name)
        return any(self._world.gather(is_there))

    def _read_round(
        self, manifest: Manifest, files: Sequence[str], reads: Mapping[str, _Read]
    ) -> dict[str, dict[str, Tensor]]:
        """The tensors of that of these files which is this rank's to read; all ranks know then that theirs is whole."""
        contents: dict[str, dict[str, Tensor]] = {}
        damages: list[str] = []
        for file in files:
            if reads[file].rank == self._world.rank:
                content = self._read_file(file, manifest.files[file], self._shelves[reads[file].shelf :], damages)
                contents |= {} if content is None else {file: content}
        is_lost = len(contents) < sum(reads[file].rank == self._world.rank for file in files)
        found = self._world.gather((damages, is_lost))
        lost = [damage for damages, is_lost in found if is_lost for damage in damages[-1:]]
        if lost:
            raise DamagedCheckpoint(lost[0])
        for damages, _ in found:
            for damage in damages:
                self._passed_over(f"read from the store instead of {damage}")
        return contents

    def _read_file(
        self, file: str, entry: FileEntry, shelves: Sequence[Shelf], damages: list[str]
    ) -> dict[str, Tensor] | None:
        """From the first shelf that has it whole; None, with its damages, when none has."""
        for shelf in shelves:
            storage = shelf.archive.storage
            try:
                return _tensors(_read(shelf.archive, f"{self._name}/{file}", file, entry))
            except (DamagedCheckpoint, FileNotFoundError, EOFError) as damage:
                reason = str(damage) if isinstance(damage, DamagedCheckpoint) else f"{file} is missing or cut"
                damages.append(f"{storage.uri}/{self._name}: {reason}")
                if shelf.is_own:
                    shelf.archive.condemn(self._name, reason)
            except StorageError as error:
                if shelf.is_shared:
                    raise
                damages.append(f"{storage.uri}/{self._name}: {error}")  # a disk that fails is no reason to give up
        return None

    def _hand_out(self, target: Tensor, source: int, content: Tensor | None) -> None:
        if content is not None:
            with torch.no_grad():
                target.copy_(content)
        if self._world.size > 1:
            self._world.broadcast_tensor(target, source)


def _rounds(reads: Mapping[str, _Read], ranks: int) -> Iterator[list[str]]:
    """Files that are read at the same time: at most one by each rank, so that no rank holds two in memory."""
    queues: list[list[str]] = [[] for _ in range(ranks)]
    for file in sorted(reads):
        queues[reads[file].rank].append(file)
    for number in range(max(map(len, queues))):
        yield [queue[number] for queue in queues if number < len(queue)]


def _read(archive: Archive, path: str, file: str, entry: FileEntry) -> Tensor:
    """A file's bytes, all verified."""
    size_bytes = archive.storage.size(path)
    if size_bytes != entry.size_bytes:
        had = "is missing" if size_bytes is None else f"has {size_bytes} bytes instead of {entry.size_bytes}"
        raise DamagedCheckpoint(f"{file} {had}")
    data = torch.empty(entry.size_bytes, dtype=torch.uint8)
    buffer = memoryview(data.numpy())

    def read_part(part: Any) -> None:
        view = buffer[part.offset : part.offset + part.length]
        archive.storage.read_into(path, part.offset, view)
        part.verify(file, view)

    with ThreadPoolExecutor(_READERS) as readers:
        list(readers.map(read_part, entry.parts()))
    return data


def _tensors(data: Tensor) -> dict[str, Tensor]:
    """The tensors of a file, as views of its bytes."""
    places = Layout.parse(memoryview(data.numpy())).places
    return {
        key: data[place.offset : place.offset + place.size_bytes].view(getattr(torch, place.dtype)).view(place.shape)
        for key, place in places.items()
    }


def _empty(place: Mapping[str, Any]) -> Tensor:
    return torch.empty(place["shape"], dtype=getattr(torch, place["dtype"]))


def _is_committed(archive: Archive, name: str) -> bool:
    return any(listed.name == name and listed.is_committed for listed in archive.checkpoints())
