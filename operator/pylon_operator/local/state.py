"""Keeps a local job's resource between runs, in `.pylon/<namespace>/<name>/status.json` under the working directory.

It stands in for the API server's store: one file, replaced in one step, under a lock that one run holds. Checkpoints
are not here: they lie where the manifest says, under the uid that this file remembers.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pylon_api import names
from pylon_api.job import IMMUTABLE_FIELDS, ConditionStatus, PylonJob, PylonJobSpec
from pylon_api.names import ConditionType


class StateError(Exception):
    """A job cannot be run here as things stand. The text is one line for a person."""


@dataclass(frozen=True)
class JobDirectory:
    """What is kept of one job."""

    path: Path

    @property
    def logs(self) -> Path:
        """Directory of the pods' logs."""
        return self.path / "logs"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the job against a second run. Raises StateError when another run has it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise StateError(f"{self.path}: process {lock.read().strip() or '?'} is running this job") from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield

    @property
    def last_saved(self) -> datetime | None:
        """When the job was last saved, or None if it never ran here."""
        try:
            return datetime.fromtimestamp((self.path / "status.json").stat().st_mtime, UTC)
        except FileNotFoundError:
            return None

    def load(self) -> PylonJob | None:
        """The job as it was last saved, or None if it never ran here."""
        path = self.path / "status.json"
        try:
            return PylonJob.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise StateError(f"{path}: damaged, or written by another version; --fresh starts anew") from error

    def save(self, job: PylonJob) -> None:
        """Replaces what is kept, so that a reader finds the old or the new and never half of one."""
        fresh = self.path / ".status.json.new"
        with fresh.open("w") as file:
            json.dump(job.to_wire(), file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.path / "status.json")

    def clear(self) -> None:
        """Forgets the job and its logs."""
        shutil.rmtree(self.logs, ignore_errors=True)
        (self.path / "status.json").unlink(missing_ok=True)


def job_directory(job: PylonJob, root: Path) -> JobDirectory:
    """Where a job is kept below a working directory."""
    return JobDirectory(root / ".pylon" / job.metadata.namespace / job.metadata.name)


def admit(wanted: PylonJob, saved: PylonJob | None) -> PylonJob:
    """The manifest's job with the identity and status of its earlier run, or with new ones if there is nothing to keep.

    A run that left no checkpoint and did not succeed is nothing to keep. Raises StateError when the manifest asks for
    another recipe than the one that the checkpoints come from.
    """
    wanted = wanted.model_copy(update={"spec": wanted.spec.model_copy(update={"managed_by": names.MANAGED_BY})})
    changed = first_difference(saved.spec, wanted.spec) if saved else None
    if saved is None or (_left_nothing(saved) and (changed or ended(saved))):
        return _with_metadata(wanted, uid=str(uuid.uuid4()), generation=1, creation_timestamp=datetime.now(UTC))
    if changed:
        raise StateError(
            f"{changed}, and this field cannot change between runs of one job; "
            "use --fresh to start anew, or another metadata.name"
        )
    generation = saved.metadata.generation + (saved.spec != wanted.spec)
    identity = {"uid": saved.metadata.uid, "creation_timestamp": saved.metadata.creation_timestamp}
    return _with_metadata(wanted, generation=generation, **identity).model_copy(update={"status": saved.status})


def verdict(job: PylonJob) -> ConditionStatus:
    """The Succeeded condition, which sums up; Unknown while in progress."""
    for condition in job.status.conditions:
        if condition.type == ConditionType.SUCCEEDED:
            return condition.status
    return ConditionStatus.UNKNOWN


def ended(job: PylonJob) -> bool:
    """Whether the job has succeeded or failed for good."""
    return verdict(job) is not ConditionStatus.UNKNOWN


def _left_nothing(job: PylonJob) -> bool:
    return job.status.checkpoint is None and verdict(job) is not ConditionStatus.TRUE


def first_difference(old: PylonJobSpec, new: PylonJobSpec) -> str | None:
    """`spec.training.batch.sequences: was 8, now 16` for the first immutable field that differs, or None."""
    before, after = old.to_wire(), new.to_wire()
    for field in IMMUTABLE_FIELDS:
        if found := _difference(f"spec.{field}", before.get(field), after.get(field)):
            return found
    return None


def _difference(path: str, old: Any, new: Any) -> str | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old | new:
            if found := _difference(f"{path}.{key}", old.get(key), new.get(key)):
                return found
        return None
    return None if old == new else f"{path}: was {json.dumps(old)}, now {json.dumps(new)}"


def _with_metadata(job: PylonJob, **fields: Any) -> PylonJob:
    return job.model_copy(update={"metadata": job.metadata.model_copy(update=fields)})
