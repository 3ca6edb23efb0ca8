"""Pods that should be gone: their node no longer answers, so nobody confirms that they ended.

Kubernetes keeps such a pod for ever, and with it the Job and the next attempt. After the grace period and a margin for
a slow kubelet the pod is removed from the API. If its node is alive after all, the old pod may still run for a moment;
checkpoints are written under a prefix of the attempt's own, so it can harm nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from pylon_operator.observation import ForceDeletePod, PodView

PATIENCE = timedelta(seconds=60)


def is_stuck(pod: PodView, now: datetime) -> bool:
    """Whether the pod's grace period ended so long ago that its node must be unreachable."""
    return not pod.terminal and pod.deletion_time is not None and now >= pod.deletion_time + PATIENCE


def force_deletions(pods: Iterable[PodView], now: datetime) -> tuple[ForceDeletePod, ...]:
    """The pods to remove now."""
    return tuple(ForceDeletePod(pod.name, pod.uid) for pod in pods if is_stuck(pod, now))


def seconds_until_next(pods: Iterable[PodView], now: datetime) -> float | None:
    """Seconds until another terminating pod counts as stuck; None when none is terminating."""
    waits = [
        (pod.deletion_time + PATIENCE - now).total_seconds()
        for pod in pods
        if pod.deletion_time is not None and not pod.terminal and not is_stuck(pod, now)
    ]
    return min(waits, default=None)
