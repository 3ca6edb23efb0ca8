"""Keeps the newest view of every child object, by the PylonJob that its label names.

It forgets everything but the view, because a full Pod takes kilobytes and a cluster holds thousands. It asks nobody
anything: a watch feeds it, and so does the answer to each of our own writes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pylon_api import names

T = TypeVar("T")
JobKey = tuple[str, str]
"""Namespace and name of a PylonJob."""


@dataclass(frozen=True, slots=True)
class Entry(Generic[T]):
    """One object: whose it is, which version was seen, and the view of it."""

    job: JobKey
    job_uid: str
    uid: str
    version: int
    view: T


class Store(Generic[T]):
    """The objects of one kind. `changed` is called with the job of every object whose view is no longer the same."""

    def __init__(self, view: Callable[[dict[str, Any]], T], changed: Callable[[JobKey], None]) -> None:
        self._view = view
        self._changed = changed
        self._entries: dict[tuple[str, str], Entry[T]] = {}
        self._by_job: defaultdict[str, dict[str, T]] = defaultdict(dict)
        self._seen_version = 0

    def of(self, job_uid: str) -> dict[str, T]:
        """The views of one job's objects by their names."""
        return dict(self._by_job.get(job_uid, {}))

    def observe(self, obj: dict[str, Any]) -> None:
        """What the watch says: an object was added or changed."""
        self._seen_version = max(self._seen_version, _version(obj))
        self._put(obj)

    def written(self, obj: dict[str, Any]) -> None:
        """What the answer to our own write says, so that the next decision need not wait for the watch.

        Ignored when the watch is already past it: the object may since be gone, and nothing would say so again.
        """
        if _version(obj) > self._seen_version:
            self._put(obj)

    def remove(self, obj: dict[str, Any]) -> None:
        """What the watch says: an object is gone."""
        metadata = obj["metadata"]
        self._seen_version = max(self._seen_version, _version(obj))
        self.deleted(metadata["namespace"], metadata["name"], metadata["uid"])

    def deleted(self, namespace: str, name: str, uid: str) -> None:
        """The object of this uid is gone, as the answer to our own delete says; a successor of its name stays."""
        entry = self._entries.get((namespace, name))
        if entry is not None and entry.uid == uid:
            self._drop((namespace, name))

    def keep_only(self, listed: set[tuple[str, str]], namespace: str | None, version: str) -> None:
        """After a list at `version`: what of `namespace` (None: all) was not in it is gone, unless we made it since."""
        self._seen_version = max(self._seen_version, int(version))
        for place, entry in list(self._entries.items()):
            if namespace in (None, place[0]) and place not in listed and entry.version <= int(version):
                self._drop(place)

    def _put(self, obj: dict[str, Any]) -> None:
        metadata = obj["metadata"]
        place = (metadata["namespace"], metadata["name"])
        labels = metadata.get("labels") or {}
        old = self._entries.get(place)
        version = _version(obj)
        if old is not None and old.version >= version:
            return
        job = (metadata["namespace"], labels.get(names.LABEL_JOB, ""))
        entry = Entry(job, labels.get(names.LABEL_JOB_UID, ""), metadata["uid"], version, self._view(obj))
        if old is not None and old.job_uid != entry.job_uid:
            self._drop(place)
        self._entries[place] = entry
        self._by_job[entry.job_uid][place[1]] = entry.view
        if old is None or old.view != entry.view or old.uid != entry.uid:
            self._changed(entry.job)

    def _drop(self, place: tuple[str, str]) -> None:
        entry = self._entries.pop(place, None)
        if entry is None:
            return
        siblings = self._by_job[entry.job_uid]
        siblings.pop(place[1], None)
        if not siblings:
            del self._by_job[entry.job_uid]
        self._changed(entry.job)


def _version(obj: dict[str, Any]) -> int:
    """Resource versions of one resource are ordered numbers (KEP-5504, and so in every release before it)."""
    return int(obj["metadata"].get("resourceVersion") or 0)
