"""Decides what one reconcile does, from what it sees and the time. Pure: no I/O, no clock, no memory but the status.

Two rules keep it safe whenever the operator is killed. First the record, then the deed: an attempt's number is on
record before anything of it is created, and its end is on record before anything of it is deleted. And one gang at a
time: nothing of an attempt is created while a Job or a live pod of another one exists.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

from pylon_api import names
from pylon_api.job import FailureAction, PylonJobStatus
from pylon_api.names import ConditionType, Reason
from pylon_operator import messages, waiting
from pylon_operator.conditions import find
from pylon_operator.errors import Refused
from pylon_operator.observation import (
    Action,
    AnnotateTopology,
    CreateAttempt,
    Decision,
    DeleteAttempt,
    DeleteJob,
    Observed,
    RequestCheckpoint,
)
from pylon_operator.outcome import Outcome, conclude
from pylon_operator.policies import deadline, restart, stuck, suspension, ttl
from pylon_operator.policies.failure import SETTLE, Failure, find_failure, judge
from pylon_operator.policies.suspension import SILENCE, Move
from pylon_operator.situation import Situation, look

RECHECK_SECONDS = 60
"""Between looks while nothing is due; a watch event or an answer of rank 0 comes sooner, unless it was lost."""
MAX_FAILURES = 10
"""Failure records kept in the status."""


def plan(observed: Observed, now: datetime) -> Decision:
    """The decision for one job. `now` is timezone-aware."""
    job = observed.job
    now = now.replace(microsecond=0)  # as the API server keeps it
    if job.spec.managed_by != names.MANAGED_BY:
        return Decision(job.status)
    if job.metadata.deletion_timestamp or observed.namespace_terminating:
        # The garbage collector deletes; only pods of dead nodes would hold it up.
        rescue = stuck.force_deletions(observed.pods, now)
        return Decision(job.status, rescue, stuck.seconds_until_next(observed.pods, now))
    s = look(observed, now)
    return conclude(s, decide(s))


def decide(s: Situation) -> Outcome:
    """The story of a job: a stage comes only when none above it applies."""
    if s.status.completion_time:
        return _keep_record(s)
    if s.current and s.current.complete:
        return _end(s, s.status, Reason.COMPLETED, messages.COMPLETED)
    if failure := find_failure(s):
        return _fail_or_restart(s, failure)
    if deadline.exceeded(s.job.spec, s.status, s.now):
        return _end_at_deadline(s)
    if s.job.spec.suspend:
        return _suspend(s)
    if s.status.attempt == 0:
        return _begin(s)
    if s.old_jobs or s.old_pods or _backing_off(s):
        return _await_turn(s)
    if s.current is None:
        return _create(s)
    return _watch(s)


def refuse(observed: Observed, refusal: Refused, now: datetime) -> Decision:
    """The decision after the API server, or a builder, refused the planned objects.

    An invalid spec ends a job that does not run yet. A running one goes on, and the refusal is shown.
    """
    s = look(observed, now.replace(microsecond=0))
    if refusal.reason is Reason.INVALID_SPEC and s.current is None:
        return conclude(s, _end(s, s.status, refusal.reason, refusal.message))
    planned = replace(decide(s), actions=(), requeue=RECHECK_SECONDS)
    if planned.ended:
        return conclude(s, planned)
    reason = planned.reason if s.current else refusal.reason
    return conclude(s, replace(planned, reason=reason, message=refusal.message))


def _begin(s: Situation) -> Outcome:
    """First sight: number the attempt, create nothing."""
    status = s.status.model_copy(update={"attempt": 1, "start_time": s.status.start_time or s.now})
    return Outcome(status, Reason.CREATED, messages.created(1), requeue=0)


def _create(s: Situation) -> Outcome:
    attempt = s.status.attempt
    create = CreateAttempt(attempt)
    return Outcome(s.status, Reason.CREATED, messages.created(attempt), (create,), RECHECK_SECONDS)


def _watch(s: Situation) -> Outcome:
    """Keep a live attempt whole and report how far it is."""
    # Left over when spec.suspend was taken back while a checkpoint was awaited.
    status = s.status.model_copy(update={"suspend_requested_time": None, "suspend_step": None})
    attempt, nodes = status.attempt, s.job.spec.nodes
    started = sum(pod.phase != "Pending" for pod in s.pods)
    wait = _soonest(
        SETTLE.total_seconds() if any(pod.failed for pod in s.pods) else RECHECK_SECONDS,
        deadline.remaining_seconds(s.job.spec, status, s.now),
        stuck.seconds_until_next(s.pods, s.now),
        waiting.seconds_until_late(s) or None,
    )
    actions = _repairs(s) + _annotations(s)
    if s.all_run:
        return Outcome(status, Reason.TRAINING, messages.training(attempt, s.trainer), actions, wait)
    message = messages.waiting_for_pods(attempt, started, nodes)
    return Outcome(status, Reason.WAITING_FOR_PODS, message, actions, wait)


def _fail_or_restart(s: Situation, failure: Failure) -> Outcome:
    """Record the failure together with what follows from it: the end, or the next attempt's number."""
    policy, record = s.job.spec.failure_policy, failure.record
    failures = [*s.status.failures, record][-MAX_FAILURES:]
    status = _fold_time(s.status, min(record.time, s.now)).model_copy(update={"failures": failures})
    action = judge(failure, policy)
    if action is FailureAction.FAIL and failure.user_error:
        return _end(s, status, Reason.USER_ERROR, record.message or messages.failed(record))
    if action is FailureAction.FAIL:
        return _end(s, status, Reason.FAILED_BY_RULE, messages.failed(record))
    if action is FailureAction.RESTART and (reason := restart.exhausted(status, policy)):
        return _end(s, status, reason, messages.exhausted(reason, record, status.restarts_without_progress))
    status = restart.count(status, action)
    until = s.now + timedelta(seconds=restart.backoff_seconds(status, policy))
    message = messages.backing_off(record, status.attempt + 1, until)
    return Outcome(_next_attempt(status, not_before=until), Reason.BACKING_OFF, message, requeue=0)


def _suspend(s: Situation) -> Outcome:
    """Save, stop, clear away; suspended once nothing is left."""
    if s.old_jobs or s.old_pods:
        return _clear(s, Reason.STOPPING, messages.stopping(len(s.old_pods)))
    if s.current is None:
        status = s.status.model_copy(update={"start_time": s.status.start_time or s.now})
        return Outcome(status, Reason.SUSPENDED_BY_USER, messages.SUSPENDED, suspended=True)
    spec, status = s.job.spec, s.status
    move = suspension.next_move(spec, status, s.trainer, s.now) if s.all_run else Move.STOP
    if move in (Move.STOP, Move.STOP_UNSAVED):
        stopped = _next_attempt(_fold_time(status, s.now), not_before=None)
        if move is Move.STOP:
            return Outcome(stopped, Reason.STOPPING, messages.stopping(len(s.pods)), requeue=0)
        message = messages.commit_timed_out(status.suspend_step, status.checkpoint)
        return Outcome(stopped, Reason.CHECKPOINT_TIMED_OUT, message, requeue=0)
    actions: tuple[Action, ...] = ()
    if move is Move.ASK and s.rank_zero_ip:
        step = suspension.step_to_save(status, s.trainer)
        status = status.model_copy(update={"suspend_requested_time": s.now, "suspend_step": step})
        actions = (RequestCheckpoint(s.rank_zero_ip),)
    wait = _soonest(SILENCE.total_seconds(), suspension.remaining_seconds(spec, status, s.now))
    message = messages.saving(status.suspend_step, spec.checkpoint_timeout_seconds)
    return Outcome(status, Reason.SAVING_BEFORE_SUSPEND, message, actions, wait)


def _await_turn(s: Situation) -> Outcome:
    """Clear earlier attempts away and let the back-off pass; the next attempt needs both."""
    status = s.status
    failure = status.failures[-1] if status.failures else None
    if status.next_attempt_time and _backing_off(s):
        message = messages.backing_off(failure, status.attempt, status.next_attempt_time)
        return _clear(s, Reason.BACKING_OFF, message, (status.next_attempt_time - s.now).total_seconds())
    message = messages.restarting(failure, status.attempt, len(s.old_jobs), len(s.old_pods))
    return _clear(s, Reason.RESTARTING, message)


def _clear(s: Situation, reason: Reason, message: str, wait: float | None = None) -> Outcome:
    """Delete the Jobs of earlier attempts; their pods go with them, by force where a node is dead."""
    deletions = tuple(DeleteAttempt(job.name, job.uid) for job in s.old_jobs if not job.deleting)
    actions = deletions + stuck.force_deletions(s.old_pods, s.now)
    wait = _soonest(wait, RECHECK_SECONDS, stuck.seconds_until_next(s.old_pods, s.now))
    return Outcome(s.status, reason, message, actions, wait)


def _end(s: Situation, status: PylonJobStatus, reason: Reason, message: str) -> Outcome:
    """Put the end on record; what is left to delete is deleted once that is written."""
    ended = {
        "completion_time": s.now,
        "next_attempt_time": None,
        "suspend_requested_time": None,
        "suspend_step": None,
    }
    status = _fold_time(status, s.now).model_copy(update=ended)
    return Outcome(status, reason, message, requeue=0, ended=True)


def _end_at_deadline(s: Situation) -> Outcome:
    used, limit = deadline.active_seconds(s.status, s.now), s.job.spec.active_deadline_seconds
    return _end(s, s.status, Reason.DEADLINE_EXCEEDED, messages.deadline_exceeded(used, limit))


def _keep_record(s: Situation) -> Outcome:
    """After the end: what still runs goes, the attempt that ended by itself stays for its logs, until the TTL."""
    left = ttl.remaining_seconds(s.job, s.now)
    verdict = find(s.status.conditions, ConditionType.SUCCEEDED)
    reason, message = (Reason(verdict.reason), verdict.message) if verdict else (Reason.COMPLETED, "")
    if left == 0:
        delete = DeleteJob(s.job.metadata.uid)
        return Outcome(s.status, reason, message, (delete,), RECHECK_SECONDS, ended=True)
    kept = s if s.ended_by_itself else s.without_current()
    live = kept.old_jobs or kept.old_pods
    outcome = _clear(kept, reason, message)
    return replace(outcome, requeue=_soonest(left, outcome.requeue if live else None), ended=True)


def _next_attempt(status: PylonJobStatus, *, not_before: datetime | None) -> PylonJobStatus:
    """The current attempt is over: the record moves on to the next number."""
    return status.model_copy(
        update={
            "attempt": status.attempt + 1,
            "attempt_job_uid": None,
            "next_attempt_time": not_before,
            "suspend_requested_time": None,
            "suspend_step": None,
        }
    )


def _fold_time(status: PylonJobStatus, until: datetime) -> PylonJobStatus:
    """Add the current attempt's running time to that of the earlier ones."""
    used = deadline.active_seconds(status, until)
    return status.model_copy(update={"active_seconds": used, "attempt_start_time": None})


def _backing_off(s: Situation) -> bool:
    return s.status.next_attempt_time is not None and s.now < s.status.next_attempt_time


def _repairs(s: Situation) -> tuple[Action, ...]:
    broken = s.missing_children or (s.current and s.current.edited)
    return (CreateAttempt(s.status.attempt),) if broken else ()


def _annotations(s: Situation) -> tuple[Action, ...]:
    return tuple(
        AnnotateTopology(pod.name, pod.uid, pod.node)
        for pod in s.pods
        if pod.node and pod.topology is None and not pod.terminal
    )


def _soonest(*seconds: float | None) -> float | None:
    return min((s for s in seconds if s is not None), default=None)
