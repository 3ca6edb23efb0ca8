"""spec.failurePolicy.maxRestarts and backoffSeconds: how often a failed gang may start again, and how soon.

The budget counts restarts since the last newly committed checkpoint. A job that moves on may so be preempted for ever,
while one that cannot get past a point ends.
"""

from __future__ import annotations

from pylon_api.job import FailureAction, FailurePolicy, PylonJobStatus
from pylon_api.names import Reason

MAX_BACKOFF_SECONDS = 3600


def forgive(status: PylonJobStatus) -> PylonJobStatus:
    """`status` with a fresh budget if a checkpoint was committed since the last restart."""
    if _committed(status) > (status.restart_checkpoint_attempt, status.restart_checkpoint_step):
        return status.model_copy(update={"restarts_without_progress": 0})
    return status


def exhausted(status: PylonJobStatus, policy: FailurePolicy) -> Reason | None:
    """Why no further counted restart is allowed, or None.

    `status.failures` holds the failure at hand already. NoProgress: at least two failures in a row, all at one step.
    """
    spent = status.restarts_without_progress
    if spent < policy.max_restarts:
        return None
    steps = {failure.step or 0 for failure in status.failures[-(spent + 1) :]}
    return Reason.NO_PROGRESS if spent and len(steps) == 1 else Reason.RESTARTS_EXHAUSTED


def count(status: PylonJobStatus, action: FailureAction) -> PylonJobStatus:
    """`status` with one more restart on the books."""
    counted = action is FailureAction.RESTART
    attempt, step = _committed(status)
    return status.model_copy(
        update={
            "restarts": status.restarts + 1,
            "restarts_without_progress": status.restarts_without_progress + counted,
            "restart_checkpoint_attempt": attempt,
            "restart_checkpoint_step": step,
        }
    )


def _committed(status: PylonJobStatus) -> tuple[int, int]:
    """Attempt and step of the newest checkpoint."""
    return status.checkpoint.recency if status.checkpoint else (0, 0)


def backoff_seconds(status: PylonJobStatus, policy: FailurePolicy) -> int:
    """Wait before the restart that `count` has just put on the books. None before the first that counts since progress,
    as GPUs that wait cost as much as GPUs that work; doubled for each one after the second."""
    spent = status.restarts_without_progress
    if spent == 1:
        return 0
    # 12 doublings of one second exceed the cap; a shift by thousands would only build a huge number first.
    return min(policy.backoff_seconds << min(max(0, spent - 2), 12), MAX_BACKOFF_SECONDS)
