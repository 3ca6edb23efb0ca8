"""spec.activeDeadlineSeconds: running time over all attempts.

An attempt runs from when all its pods first ran; time suspended, backing off or waiting for pods does not count.
"""

from __future__ import annotations

from datetime import datetime

from pylon_api.job import PylonJobSpec, PylonJobStatus


def active_seconds(status: PylonJobStatus, until: datetime) -> int:
    """Running time so far, the current attempt's up to `until` included."""
    if status.attempt_start_time is None:
        return status.active_seconds
    return status.active_seconds + max(0, int((until - status.attempt_start_time).total_seconds()))


def exceeded(spec: PylonJobSpec, status: PylonJobStatus, now: datetime) -> bool:
    """Whether the running time is used up."""
    limit = spec.active_deadline_seconds
    return limit is not None and active_seconds(status, now) >= limit


def remaining_seconds(spec: PylonJobSpec, status: PylonJobStatus, now: datetime) -> float | None:
    """Seconds until the deadline; None without one or while no time passes."""
    if spec.active_deadline_seconds is None or status.attempt_start_time is None:
        return None
    return max(0, spec.active_deadline_seconds - active_seconds(status, now))
