"""Every sentence that the operator says to a person, in conditions and events. Words only, no decisions."""

from __future__ import annotations

from datetime import datetime

from rich.filesize import decimal

from pylon_api.job import FailureRecord
from pylon_api.names import Reason
from pylon_api.run import CheckpointReport, SaveReport, TrainerStatus

MAX_LENGTH = 500
"""Of a message taken over from a log: enough for a sentence, not for a page."""

IN_PROGRESS = "The job has not ended"
NOT_SUSPENDED = "spec.suspend is false"
SUSPENDED = "spec.suspend is true; no pods exist"
RESUMED = "spec.suspend is false again"
CHECKPOINTS_OFF = "spec.training.checkpoint is not set, so a restart begins anew"
NO_CHECKPOINT_YET = "No checkpoint has been committed yet"
COMPLETED = "Training is complete"
JOB_DELETED = "Its Job was deleted, though not by Pylon"


def last_line(text: str) -> str:
    """The last line that says something; in logs that is where the error stands."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:MAX_LENGTH] if lines else ""


def pod_vanished(job_reason: str) -> str:
    return f"A pod was deleted before it could report (Job: {job_reason or 'Failed'})"


def node_lost(node: str | None) -> str:
    return f"Node {node or 'unknown'} does not confirm that the pod has ended"


def created(attempt: int) -> str:
    return f"Attempt {attempt} is being created"


def waiting_for_pods(attempt: int, running: int, nodes: int) -> str:
    return f"Attempt {attempt}: {running} of {nodes} pods have started"


def training(attempt: int, trainer: TrainerStatus | None) -> str:
    text = f"Attempt {attempt} is running"
    if trainer and trainer.restored_from:
        text += f", restored from {trainer.restored_from}"
    if trainer and trainer.notices:
        text += f"; {trainer.notices[-1]}"
    return text


def failed(failure: FailureRecord) -> str:
    where = f" in pod {failure.pod}" if failure.pod else ""
    code = f" (exit code {failure.exit_code})" if failure.exit_code is not None else ""
    words = f": {failure.message}" if failure.message else ""
    return f"Attempt {failure.attempt} failed with {failure.reason}{where}{code}{words}"


def backing_off(failure: FailureRecord | None, attempt: int, until: datetime) -> str:
    return f"{_after(failure, attempt)}attempt {attempt} starts after {until:%H:%M:%S} UTC"


def restarting(failure: FailureRecord | None, attempt: int, jobs: int, pods: int) -> str:
    waiting = f" once {jobs} Job(s) and {pods} pod(s) of earlier attempts are gone" if jobs or pods else ""
    return f"{_after(failure, attempt)}attempt {attempt} starts{waiting}"


def stopping(pods: int) -> str:
    return f"Deleting the Job and {pods} pod(s) before the job is suspended"


def saving(step: int | None, timeout_seconds: int) -> str:
    return f"Waiting up to {timeout_seconds} s for a checkpoint of step {step} or later"


def commit_timed_out(step: int | None, committed: CheckpointReport | None) -> str:
    kept = f"step {committed.step} is the newest saved" if committed else "none was ever saved"
    return f"No checkpoint of step {step} or later was committed in time; {kept}"


def committed(checkpoint: CheckpointReport) -> str:
    """Without its age, which would change the condition all the time."""
    size = f", {decimal(checkpoint.size_bytes)}" if checkpoint.size_bytes is not None else ""
    when = f", committed at {checkpoint.committed_time:%Y-%m-%d %H:%M:%S} UTC" if checkpoint.committed_time else ""
    return f"Step {checkpoint.step} at {checkpoint.uri}{size}{when}"


def saves_fail(saves: SaveReport, checkpoint: CheckpointReport | None) -> str:
    count = "The last checkpoint" if saves.failed_in_row == 1 else f"The last {saves.failed_in_row} checkpoints"
    kept = f"newest committed: {committed(checkpoint)}" if checkpoint else "none has ever been committed"
    return f"{count} could not be saved: {last_line(saves.failure) or 'no reason given'}; {kept}"


def pods_ready(ready: int, nodes: int, waiting: str | None) -> str:
    return f"{ready} of {nodes} pods are ready" + (f"; {waiting}" if waiting else "")


def pods_wait(count: int, pod: str, reason: str, message: str) -> str:
    return f"{count} cannot start, {pod}: {reason}" + (f": {message}" if message else "")


def pods_missing(count: int, job: str) -> str:
    return f"{count} do not exist yet: `kubectl describe job {job}` says why, for example a quota"


def exhausted(reason: Reason, failure: FailureRecord, restarts: int) -> str:
    where = f" died at step {failure.step or 0}" if reason is Reason.NO_PROGRESS else ""
    return (
        f"{restarts} restarts{where} without a new checkpoint, failurePolicy.maxRestarts allows no more. "
        f"{failed(failure)}"
    )


def deadline_exceeded(active_seconds: int, limit_seconds: int | None) -> str:
    return f"Ran for {active_seconds} s, activeDeadlineSeconds is {limit_seconds}"


def _after(failure: FailureRecord | None, attempt: int) -> str:
    return f"{failed(failure)}; " if failure and failure.attempt == attempt - 1 else ""
