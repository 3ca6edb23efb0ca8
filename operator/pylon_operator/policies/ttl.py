"""spec.ttlSecondsAfterFinished: when a finished PylonJob is deleted with all that it owns, as batch/v1 does.

The PylonJob itself goes, never a child alone: a child that vanishes would be made again.
"""

from __future__ import annotations

from datetime import datetime

from pylon_api.job import PylonJob


def remaining_seconds(job: PylonJob, now: datetime) -> float | None:
    """Seconds until the job is to be deleted, at least 0; None when it has not ended on record or stays for ever."""
    ttl = job.spec.ttl_seconds_after_finished
    if ttl is None or job.status.completion_time is None:
        return None
    return max(0.0, ttl - (now - job.status.completion_time).total_seconds())
