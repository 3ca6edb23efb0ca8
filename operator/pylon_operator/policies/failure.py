"""Why an attempt failed, and what spec.failurePolicy.rules makes of it.

One death takes the gang along: peers lose the rendezvous, the Job controller ends the rest. So the pod that explains
the attempt is the one that failed first, a mere consequence (PeerLost, Stopped) only if there is nothing else, and a
mistake of the user's always. Nothing is decided before all pods have spoken or a short while has passed, because the
culprit's node may report later than its victims'.

A pod that is being evicted, preempted or drained ends its attempt as soon as that is seen: it is lost for sure, all
pods save within their grace, and once it has gone nothing would tell why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from pylon_api.job import FailureAction, FailurePolicy, FailureRecord
from pylon_api.names import SECONDARY, USER_ERRORS, ExitCode, Reason
from pylon_operator import messages
from pylon_operator.observation import PodView
from pylon_operator.policies.stuck import is_stuck
from pylon_operator.situation import Situation, termination_report

SETTLE = timedelta(seconds=10)

POD_REASONS = {
    "Evicted": Reason.POD_EVICTED,
    "OOMKilled": Reason.OOM_KILLED,
    "NodeLost": Reason.NODE_LOST,
    "Preempted": Reason.PREEMPTED,
}


@dataclass(frozen=True, slots=True)
class Failure:
    """What ended an attempt."""

    record: FailureRecord
    pod_reason: str | None = None
    """The reason in Kubernetes' words, which rules may name too."""

    @property
    def user_error(self) -> bool:
        """Whether only a person can mend it."""
        return self.record.exit_code in USER_ERRORS


def find_failure(s: Situation) -> Failure | None:
    """How the current attempt failed, or None while it lives or has not been heard out."""
    if s.current is None or s.current.deleting:
        return _failure(s, Reason.JOB_DELETED, messages.JOB_DELETED) if s.status.attempt_job_uid else None
    lost = [pod for pod in s.pods if pod.failed or pod.disrupted or is_stuck(pod, s.now)]
    if lost:
        return _explain(s, _cause(lost)) if _settled(s, lost) else None
    # Jobs and pods are watched apart: while all pods are there and some live, what failed the Job is yet to be seen.
    still_whole = len(s.pods) >= s.job.spec.nodes and not all(pod.terminal for pod in s.pods)
    if s.current.failed and not still_whole:
        return _failure(s, Reason.POD_DELETED, messages.pod_vanished(s.current.reason))
    return None


def judge(failure: Failure, policy: FailurePolicy) -> FailureAction:
    """The first rule that matches decides; without one, user errors fail and everything else restarts."""
    reasons = {failure.pod_reason, failure.record.reason}
    for rule in policy.rules:
        if rule.exit_codes and failure.record.exit_code not in rule.exit_codes:
            continue
        if rule.pod_reasons and reasons.isdisjoint(rule.pod_reasons):
            continue
        return rule.action
    return FailureAction.FAIL if failure.user_error else FailureAction.RESTART


def _settled(s: Situation, lost: Sequence[PodView]) -> bool:
    first = min((pod.finished_time for pod in lost if pod.finished_time), default=None)
    heard_out = all(pod.terminal or pod in lost for pod in s.pods)
    return heard_out or first is None or s.now >= first + SETTLE


def _cause(lost: Sequence[PodView]) -> PodView:
    def precedence(pod: PodView) -> tuple[int, float, int]:
        secondary = pod.exit_code in SECONDARY and pod.reason not in POD_REASONS
        rank = 0 if pod.exit_code in USER_ERRORS else 2 if secondary else 1
        finished = pod.finished_time.timestamp() if pod.finished_time else float("inf")
        return rank, finished, pod.index

    return min(lost, key=precedence)


def _explain(s: Situation, pod: PodView) -> Failure:
    report = termination_report(pod)
    if not pod.failed and not pod.disrupted:
        return _failure(s, Reason.NODE_LOST, messages.node_lost(pod.node), pod)
    if pod.reason in POD_REASONS:
        reason: str = POD_REASONS[pod.reason]
    elif report is not None:
        reason = report.reason
    elif pod.exit_code in set(ExitCode):
        reason = ExitCode(pod.exit_code).reason
    else:
        reason = Reason.POD_FAILED
    return _failure(s, reason, messages.last_line(report.message if report else pod.message), pod)


def _failure(s: Situation, reason: str, message: str, pod: PodView | None = None) -> Failure:
    record = FailureRecord(
        attempt=s.status.attempt,
        reason=reason,
        message=message,
        exit_code=pod.exit_code if pod else None,
        pod=pod.name if pod else None,
        node=pod.node if pod else None,
        step=s.status.training.step if s.status.training else None,
        time=(pod.finished_time if pod else None) or s.now,
    )
    return Failure(record, pod.reason if pod else None)
