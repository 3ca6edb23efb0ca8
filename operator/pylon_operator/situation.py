"""What an observation means: which Job and pods are the current attempt's, which are left over, how far training is.

Reads off facts and puts them into the status; decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from pylon_api.job import PylonJob, PylonJobStatus, TrainingProgress
from pylon_api.run import TerminationReport, TrainerPhase, TrainerStatus
from pylon_operator.observation import AttemptView, Observed, PodView
from pylon_operator.policies import restart

DECIMALS = 4
"""Of losses and rates on the resource, which people read in a column; logs and metrics have them in full."""
MAX_TEXT_LENGTH = 2000
"""Of a notice or sample on the resource."""


@dataclass(frozen=True, slots=True)
class Situation:
    """One job as the decision sees it."""

    job: PylonJob
    now: datetime
    status: PylonJobStatus
    """The recorded status, brought up to date with what can be read off: Job uid, start, progress, checkpoint."""
    current: AttemptView | None
    """The Job of the current attempt, if it exists and is the one on record."""
    pods: tuple[PodView, ...]
    """Pods of that Job."""
    old_jobs: tuple[AttemptView, ...]
    """Every other Job of this PylonJob."""
    old_pods: tuple[PodView, ...]
    """Every other pod that may still run."""
    trainer: TrainerStatus | None
    """Rank 0 of the current attempt, while it answers."""
    missing_children: frozenset[str]

    @property
    def rank_zero_ip(self) -> str | None:
        """Where rank 0 answers, while its pod lives."""
        return next((pod.ip for pod in self.pods if pod.index == 0 and not pod.terminal), None)

    @property
    def all_run(self) -> bool:
        """Whether every pod of the gang has started."""
        return len(self.pods) >= self.job.spec.nodes and all(pod.phase != "Pending" for pod in self.pods)

    @property
    def ready(self) -> int:
        """Pods of the current attempt that are ready."""
        return sum(pod.ready for pod in self.pods)

    @property
    def ended_by_itself(self) -> bool:
        """Whether the current attempt completed or failed, so that the Job controller ends the rest of it."""
        if self.current is None:
            return True
        return self.current.complete or self.current.failed or any(pod.phase == "Failed" for pod in self.pods)

    def without_current(self) -> Situation:
        """The same with the current attempt among the old ones, to be cleared away like them."""
        old_jobs = (*self.old_jobs, self.current) if self.current else self.old_jobs
        live = tuple(pod for pod in self.pods if not pod.terminal)
        return replace(self, current=None, pods=(), old_jobs=old_jobs, old_pods=self.old_pods + live)


def look(observed: Observed, now: datetime) -> Situation:
    """Sort the observation."""
    job = observed.job
    recorded = job.status
    current = next((a for a in observed.attempts if _is_current(a, recorded)), None)
    current_uid = current.uid if current else None
    trainer = observed.trainer
    if trainer and (trainer.uid, trainer.attempt) != (job.metadata.uid, recorded.attempt):
        trainer = None
    s = Situation(
        job=job,
        now=now,
        status=_read_progress(job, trainer, observed.pods),
        current=current,
        pods=tuple(pod for pod in observed.pods if pod.job_uid == current_uid),
        old_jobs=tuple(a for a in observed.attempts if a is not current),
        old_pods=tuple(pod for pod in observed.pods if not pod.terminal and pod.job_uid != current_uid),
        trainer=trainer,
        missing_children=observed.missing_children,
    )
    return _read_attempt(s)


def termination_report(pod: PodView) -> TerminationReport | None:
    """The launcher's report in the pod's termination message, or None when others wrote it."""
    if not pod.message.startswith("{"):
        return None
    try:
        return TerminationReport.model_validate_json(pod.message)
    except ValidationError:
        return None


def _is_current(attempt: AttemptView, status: PylonJobStatus) -> bool:
    return attempt.attempt == status.attempt and status.attempt_job_uid in (None, attempt.uid)


def _read_attempt(s: Situation) -> Situation:
    """Put the current Job's uid and start on record."""
    if s.current is None:
        return s
    changes: dict[str, Any] = {"attempt_job_uid": s.current.uid, "next_attempt_time": None}
    if s.all_run and s.status.attempt_start_time is None and s.status.completion_time is None:
        changes["attempt_start_time"] = s.now
    return replace(s, status=s.status.model_copy(update=changes))


def _read_progress(job: PylonJob, trainer: TrainerStatus | None, pods: tuple[PodView, ...]) -> PylonJobStatus:
    """Progress as the newest attempt tells it, and the newest checkpoint that any attempt tells of.

    What is on record stays when nobody speaks any more.
    """
    status = job.status
    reports = list(_reports(job.metadata.uid, trainer, pods))
    speaking = [r for r in reports if r.phase not in (TrainerPhase.STARTING, TrainerPhase.RESTORING)]
    if speaking:
        newest = max(speaking, key=lambda report: (report.attempt, report.step))
        progress = _shown(newest.model_dump(include=set(TrainingProgress.model_fields)))
        status = status.model_copy(update={"training": TrainingProgress.model_validate(progress)})
    known = [status.checkpoint, *(report.checkpoint for report in reports)]
    committed = [checkpoint for checkpoint in known if checkpoint]
    if committed:
        newest_checkpoint = max(committed, key=lambda checkpoint: checkpoint.recency)
        status = status.model_copy(update={"checkpoint": newest_checkpoint})
    return restart.forgive(status)


def _shown(value: Any) -> Any:
    match value:
        case float():
            return round(value, DECIMALS)
        case str():
            return value[:MAX_TEXT_LENGTH]
        case list():
            return [_shown(item) for item in value]
        case dict():
            return {field: _shown(part) for field, part in value.items()}
    return value


def _reports(uid: str, trainer: TrainerStatus | None, pods: tuple[PodView, ...]) -> Iterator[TrainerStatus]:
    """Last words first: of two reports of one step they are the later one, and know of the sample and the export."""
    for pod in pods:
        # Only rank 0's pod reports progress; a gang may have thousands.
        report = termination_report(pod) if pod.terminal and pod.index == 0 else None
        if report and report.final and report.final.uid == uid:
            yield report.final
    if trainer:
        yield trainer
