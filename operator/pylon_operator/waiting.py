"""Says what keeps pods from running, in Kubernetes' own words: no node fits, no image, a full quota.

It only explains. A job waits for ever, because nodes, images and quotas come back without Pylon.
"""

from __future__ import annotations

from datetime import timedelta

from pylon_operator import messages
from pylon_operator.situation import Situation

ON_THE_WAY = frozenset({"ContainerCreating", "PodInitializing"})
"""What a kubelet gives as the reason while all goes well."""
PATIENCE = timedelta(seconds=20)
"""The Job controller makes pods within seconds; those that are missing later were refused, or it is very busy."""


def explain(s: Situation) -> str | None:
    """What the gang waits for, or None when nothing is in its way."""
    if s.current is None or s.ended_by_itself:
        return None
    held = [pod for pod in s.pods if pod.phase == "Pending" and pod.reason and pod.reason not in ON_THE_WAY]
    if held:
        first = min(held, key=lambda pod: pod.index)
        return messages.pods_wait(len(held), first.name, str(first.reason), first.message)
    if seconds_until_late(s) == 0:
        return messages.pods_missing(s.job.spec.nodes - len(s.pods), s.current.name)
    return None


def seconds_until_late(s: Situation) -> float | None:
    """Seconds until pods that do not exist are worth a word, at least 0; None when none is missing."""
    if s.current is None or s.current.creation_time is None or len(s.pods) >= s.job.spec.nodes:
        return None
    return max(0.0, (s.current.creation_time + PATIENCE - s.now).total_seconds())
