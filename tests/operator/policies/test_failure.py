"""Which pod explains a failed attempt, and what rules and defaults make of it."""

from __future__ import annotations

import pytest
from operator_builders import NOW, Scene, a_report, a_trainer, ago

from pylon_api.job import FailureAction, FailurePolicy, FailureRecord, FailureRule
from pylon_operator.policies.failure import Failure, find_failure, judge
from pylon_operator.situation import look


def cause(scene: Scene) -> Failure | None:
    return find_failure(look(scene.observed(), NOW))


@pytest.mark.parametrize(
    ("exit_codes", "pod", "reason"),
    [
        ((70, 70), 0, "Internal"),
        ((76, 71), 1, "OutOfMemory"),
        ((75, 76), 0, "Stopped"),
        ((75, 74, 70), 1, "Storage"),
        ((70, 76, 78), 2, "BadConfig"),
        ((139, 65), 1, "BadData"),
        ((139, 76), 0, "PodFailed"),
        ((None, 76), 0, "PodFailed"),
    ],
)
def test_first_failure_explains_consequences_last_user_errors_always(
    exit_codes: tuple[int | None, ...], pod: int, reason: str
) -> None:
    found = cause(Scene(nodes=len(exit_codes), training={"batch": {"sequences": 6}}).failing(*exit_codes))
    assert found is not None
    assert (found.record.pod, found.record.reason) == (f"demo-a1-{pod}", reason)
    assert found.record.exit_code == exit_codes[pod]
    assert found.record.node == f"node-{pod}"
    assert found.record.time == ago(20 - pod)


@pytest.mark.parametrize(
    ("pod", "reason", "message"),
    [
        ({"message": a_report(70, "Internal", "IndexError: 7")}, "Internal", "IndexError: 7"),
        ({"message": "Traceback\n  File x\nImportError: torch\n\n"}, "PodFailed", "ImportError: torch"),
        ({"message": "{not a report}"}, "PodFailed", "{not a report}"),
        ({"message": '{"another": "program"}'}, "PodFailed", '{"another": "program"}'),
        ({"reason": "OOMKilled", "exit_code": 137}, "OOMKilled", ""),
        ({"reason": "Evicted", "message": "low on memory"}, "PodEvicted", "low on memory"),
        ({"reason": "NodeLost"}, "NodeLost", ""),
        ({"reason": "Error", "exit_code": 1}, "PodFailed", ""),
    ],
)
def test_words_of_the_pod(pod: dict[str, object], reason: str, message: str) -> None:
    found = cause(Scene(nodes=1).failing(1, **pod))
    assert found is not None
    assert (found.record.reason, found.record.message) == (reason, message)


def test_step_comes_from_rank_zeros_last_words() -> None:
    last_words = a_report(76, "PeerLost", final=a_trainer(step=83))
    scene = Scene().recorded(attempt=1, attempt_job_uid="job-1").batch_job(failed=True)
    scene.pod(0, phase="Failed", exit_code=76, message=last_words).pod(1, phase="Failed", exit_code=70)
    found = cause(scene)
    assert found is not None
    assert (found.record.pod, found.record.step) == ("demo-a1-1", 83)


def test_a_sidecar_does_not_hide_a_failed_trainer() -> None:
    found = cause(Scene(nodes=1).recorded(attempt=1).batch_job().pod(0, exit_code=70, finished_time=ago(3)))
    assert found is not None
    assert found.record.reason == "Internal"


@pytest.mark.parametrize(
    ("finished_seconds_ago", "other", "explained"),
    [
        (3, {"phase": "Running"}, False),
        (10, {"phase": "Running"}, True),
        (3, {"phase": "Failed", "exit_code": 76, "finished_time": ago(2)}, True),
        (3, {"phase": "Succeeded"}, True),
        (3, {"phase": "Running", "exit_code": 76}, True),
    ],
)
def test_waits_a_little_for_the_others_to_speak(
    finished_seconds_ago: float, other: dict[str, object], explained: bool
) -> None:
    scene = Scene().recorded(attempt=1, attempt_job_uid="job-1").batch_job(failed=True)
    scene.pod(0, phase="Failed", exit_code=76, finished_time=ago(finished_seconds_ago)).pod(1, **other)
    assert (cause(scene) is not None) == explained


@pytest.mark.parametrize(
    ("scene", "reason"),
    [
        (Scene().running(), None),
        (Scene().recorded(attempt=1), None),
        (Scene().recorded(attempt=1, attempt_job_uid="job-1"), "JobDeleted"),
        (Scene().recorded(attempt=1, attempt_job_uid="job-1").batch_job(uid="another"), "JobDeleted"),
        (Scene().recorded(attempt=1).batch_job(deleting=True), "JobDeleted"),
        (Scene().recorded(attempt=1).batch_job(failed=True, reason="BackoffLimitExceeded"), "PodDeleted"),
        (Scene().recorded(attempt=1).batch_job(failed=True).pod(0), "PodDeleted"),
        (Scene().recorded(attempt=1).batch_job(failed=True).pod(0).pod(1), None),
        (Scene(nodes=1).recorded(attempt=1).batch_job(failed=True).pod(0, phase="Succeeded"), "PodDeleted"),
        (Scene().recorded(attempt=1).batch_job().pod(0).pod(1, deletion_time=ago(61)), "NodeLost"),
        (Scene(nodes=1).recorded(attempt=1).batch_job().pod(0, deletion_time=ago(59)), None),
        (Scene(nodes=1).recorded(attempt=1).batch_job().pod(0, deletion_time=ago(60)), "NodeLost"),
    ],
)
def test_failures_without_a_failed_pod(scene: Scene, reason: str | None) -> None:
    found = cause(scene)
    assert (found.record.reason if found else None) == reason


@pytest.mark.parametrize(
    ("pod", "reason"),
    [
        ({"reason": "Preempted"}, "Preempted"),
        ({"reason": "Evicted"}, "PodEvicted"),
        ({"reason": "NodeLost"}, "NodeLost"),
        ({"reason": "Preempted", "phase": "Failed", "exit_code": 75, "finished_time": ago(1)}, "Preempted"),
        ({"reason": None}, None),
        ({"reason": "Preempted", "deletion_time": None}, None),
    ],
)
def test_a_pod_that_is_taken_away_explains_its_attempt_before_it_has_gone(
    pod: dict[str, object], reason: str | None
) -> None:
    scene = Scene().recorded(attempt=1, attempt_job_uid="job-1").batch_job()
    if pod.get("phase") == "Failed":
        scene.pod(0, phase="Failed", exit_code=75, finished_time=ago(1))  # its peer left at the same step
    else:
        scene.pod(0)
    found = cause(scene.pod(1, **{"deletion_time": ago(-30), **pod}))
    assert (found.record.reason if found else None) == reason
    if found:
        assert found.record.pod == "demo-a1-1"


RESTART, FREELY, FAIL = FailureAction.RESTART, FailureAction.RESTART_FREELY, FailureAction.FAIL


@pytest.mark.parametrize(
    ("rules", "exit_code", "pod_reason", "action"),
    [
        ([], 70, None, RESTART),
        ([], 75, None, RESTART),
        ([], None, "Evicted", RESTART),
        ([], 78, None, FAIL),
        ([], 65, None, FAIL),
        ([FailureRule(action=RESTART, exit_codes=[65])], 65, None, RESTART),
        ([FailureRule(action=FAIL, exit_codes=[71, 70])], 70, None, FAIL),
        ([FailureRule(action=FAIL, exit_codes=[71])], 70, None, RESTART),
        ([FailureRule(action=FREELY, pod_reasons=["Evicted"])], None, "Evicted", FREELY),
        ([FailureRule(action=FREELY, pod_reasons=["PodEvicted"])], None, "Evicted", FREELY),
        ([FailureRule(action=FAIL, exit_codes=[137], pod_reasons=["OOMKilled"])], 137, "OOMKilled", FAIL),
        ([FailureRule(action=FAIL, exit_codes=[137], pod_reasons=["OOMKilled"])], 137, "Error", RESTART),
        (
            [FailureRule(action=FREELY, exit_codes=[70]), FailureRule(action=FAIL, exit_codes=[70])],
            70,
            None,
            FREELY,
        ),
    ],
)
def test_first_matching_rule_decides_then_the_defaults(
    rules: list[FailureRule], exit_code: int | None, pod_reason: str | None, action: FailureAction
) -> None:
    reason = {"Evicted": "PodEvicted"}.get(pod_reason or "", "PodFailed")
    failure = Failure(FailureRecord(attempt=1, reason=reason, exit_code=exit_code, time=NOW), pod_reason)
    assert judge(failure, FailurePolicy(rules=rules)) is action
