"""What a job shows while its pods cannot run."""

from __future__ import annotations

import pytest
from operator_builders import Scene, ago, condition

from pylon_api.names import ConditionType

UNSCHEDULABLE = {"reason": "Unschedulable", "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."}
NO_IMAGE = {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "x"'}
PENDING = {"phase": "Pending", "node": None}


def starting(seconds: float = 5, **job: object) -> Scene:
    """An attempt on record whose Job was made so long ago."""
    return Scene().recorded(attempt=1, attempt_job_uid="job-1").batch_job(creation_time=ago(seconds), **job)


@pytest.mark.parametrize(
    ("scene", "message"),
    [
        (starting(), "0 of 2 pods are ready"),
        (starting(19), "0 of 2 pods are ready"),
        (
            starting(20).pod(0),
            "0 of 2 pods are ready; 1 do not exist yet: `kubectl describe job demo-a1` says why, for example a quota",
        ),
        (starting(99, failed=True).pod(0, phase="Failed", finished_time=ago(1)), "0 of 2 pods are ready"),
        (starting(99, complete=True), "0 of 2 pods are ready"),
        (starting(99).pod(0, **PENDING).pod(1, **PENDING), "0 of 2 pods are ready"),
        (starting().pod(0, **PENDING, reason="ContainerCreating").pod(1), "0 of 2 pods are ready"),
        (
            starting().pod(1, **PENDING, **UNSCHEDULABLE).pod(0, **PENDING, **UNSCHEDULABLE),
            "0 of 2 pods are ready; 2 cannot start, demo-a1-0: Unschedulable: "
            "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
        ),
        (
            starting().pod(0, ready=True).pod(1, phase="Pending", **NO_IMAGE),
            '1 of 2 pods are ready; 1 cannot start, demo-a1-1: ImagePullBackOff: Back-off pulling image "x"',
        ),
        (Scene().running(), "2 of 2 pods are ready"),
    ],
)
def test_pods_ready_says_what_pods_wait_for(scene: Scene, message: str) -> None:
    assert condition(scene.decide(), ConditionType.PODS_READY).message == message


def test_looks_again_when_pods_are_late() -> None:
    assert starting(5).decide().requeue_after_seconds == 15
    assert starting(20).decide().requeue_after_seconds == 60


def test_words_of_others_never_break_the_status() -> None:
    scene = starting().pod(0, **PENDING, reason="Unschedulable", message="no " * 20000)
    assert len(condition(scene.decide(), ConditionType.PODS_READY).message) == 4096
