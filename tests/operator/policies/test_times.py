"""The policies that only compare times: deadline, TTL, stuck pods."""

from __future__ import annotations

from datetime import datetime

import pytest
from operator_builders import NOW, Scene, a_job, ago

from pylon_api.job import PylonJobStatus
from pylon_operator.observation import ForceDeletePod
from pylon_operator.policies import deadline, stuck, ttl


@pytest.mark.parametrize(
    ("limit", "earlier", "started", "used", "remaining"),
    [
        (None, 0, ago(50), 50, None),
        (100, 0, None, 0, None),
        (100, 30, None, 30, None),
        (100, 30, ago(50), 80, 20),
        (100, 30, ago(70), 100, 0),
        (100, 30, ago(500), 530, 0),
    ],
)
def test_deadline_counts_running_time_over_attempts(
    limit: int | None, earlier: int, started: datetime | None, used: int, remaining: float | None
) -> None:
    spec = a_job(active_deadline_seconds=limit).spec
    status = PylonJobStatus(active_seconds=earlier, attempt_start_time=started)
    assert deadline.active_seconds(status, NOW) == used
    assert deadline.remaining_seconds(spec, status, NOW) == remaining
    assert deadline.exceeded(spec, status, NOW) == (remaining == 0)


@pytest.mark.parametrize(
    ("seconds", "completed", "remaining"),
    [(None, ago(5), None), (60, None, None), (60, ago(5), 55), (60, ago(60), 0), (60, ago(999), 0), (0, NOW, 0)],
)
def test_ttl_starts_at_the_end(seconds: int | None, completed: datetime | None, remaining: float | None) -> None:
    scene = Scene(ttl_seconds_after_finished=seconds).recorded(completion_time=completed)
    assert ttl.remaining_seconds(scene.job, NOW) == remaining


@pytest.mark.parametrize(
    ("phase", "deleted", "is_stuck", "wait"),
    [
        ("Running", None, False, None),
        ("Running", ago(-30), False, 90),
        ("Running", ago(59), False, 1),
        ("Running", ago(60), True, None),
        ("Pending", ago(60), True, None),
        ("Failed", ago(60), False, None),
    ],
)
def test_a_pod_is_stuck_a_minute_after_its_grace(
    phase: str, deleted: datetime | None, is_stuck: bool, wait: float | None
) -> None:
    pods = Scene().batch_job().pod(0, phase=phase, deletion_time=deleted).observed().pods
    assert stuck.force_deletions(pods, NOW) == ((ForceDeletePod("demo-a1-0", "pod-1-0"),) if is_stuck else ())
    assert stuck.seconds_until_next(pods, NOW) == wait
