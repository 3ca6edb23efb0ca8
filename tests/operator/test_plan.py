"""One decision at a time: what is seen, and what the plan makes of it. Whole lives are in test_lives."""

from __future__ import annotations

from typing import Any

import pytest
from operator_builders import (
    NOW,
    UID,
    Scene,
    a_checkpoint,
    a_report,
    a_trainer,
    ago,
    condition,
    deeds,
    events,
    running_reason,
    verdict,
)

from pylon_api.job import ConditionStatus, FailurePolicy, FailureRecord, TrainingProgress
from pylon_api.names import ConditionType, Reason
from pylon_api.run import (
    CheckpointReport,
    DifficultyReport,
    GateDecision,
    GateReport,
    Histogram,
    SaveReport,
    TrainerPhase,
)
from pylon_operator.errors import Refused
from pylon_operator.observation import (
    AnnotateTopology,
    CreateAttempt,
    DeleteAttempt,
    DeleteJob,
    EmitEvent,
    ForceDeletePod,
    RequestCheckpoint,
)
from pylon_operator.plan import refuse

DELETE_1 = DeleteAttempt("demo-a1", "job-1")


def test_first_sight_numbers_the_attempt_and_creates_nothing() -> None:
    decision = Scene().decide()
    assert deeds(decision) == []
    assert (decision.status.attempt, decision.status.start_time) == (1, NOW)
    assert decision.requeue_after_seconds == 0
    assert verdict(decision) == ("Unknown", "InProgress")
    assert decision.status.phase == "Pending"
    assert decision.status.observed_generation == 1


def test_the_number_on_record_is_created() -> None:
    decision = Scene().recorded(attempt=3).decide()
    assert deeds(decision) == [CreateAttempt(3)]
    assert decision.status.attempt == 3


@pytest.mark.parametrize(
    ("scene", "actions"),
    [
        pytest.param(Scene().recorded(attempt=2).batch_job(1), [DELETE_1], id="an older Job"),
        pytest.param(Scene().recorded(attempt=2).batch_job(1, deleting=True), [], id="an older Job on its way"),
        pytest.param(Scene().recorded(attempt=2).pod(0, attempt=1), [], id="an older pod that may run"),
        pytest.param(Scene().recorded(attempt=1).pod(0, job_uid="gone"), [], id="a pod of a Job never recorded"),
        pytest.param(
            Scene().recorded(attempt=2).pod(0, attempt=1, deletion_time=ago(61)),
            [ForceDeletePod("demo-a1-0", "pod-1-0")],
            id="an older pod on a dead node",
        ),
        pytest.param(
            Scene().recorded(attempt=2).batch_job(2, deleting=True, uid="x").batch_job(1, deleting=True),
            [],
            id="both on their way",
        ),
    ],
)
def test_nothing_is_created_beside_another_gang(scene: Scene, actions: list[Any]) -> None:
    assert deeds(scene.decide()) == actions


def test_terminal_pods_of_earlier_attempts_do_not_block() -> None:
    scene = Scene().recorded(attempt=2).pod(0, phase="Failed").pod(1, phase="Succeeded")
    assert deeds(scene.decide()) == [CreateAttempt(2)]


def test_back_off_passes_before_the_next_attempt() -> None:
    failure = FailureRecord(attempt=1, reason="OOMKilled", pod="demo-a1-1", exit_code=137, time=ago(5))
    scene = Scene().recorded(attempt=2, next_attempt_time=ago(-20), failures=[failure])
    decision = scene.decide()
    assert deeds(decision) == []
    assert decision.requeue_after_seconds == 20
    assert running_reason(decision) == "BackingOff"
    message = condition(decision, ConditionType.RUNNING).message
    assert message == (
        "Attempt 1 failed with OOMKilled in pod demo-a1-1 (exit code 137); attempt 2 starts after 12:00:20 UTC"
    )
    assert deeds(scene.decide(ago(-20))) == [CreateAttempt(2)]


def test_waiting_for_pods() -> None:
    scene = Scene().recorded(attempt=1).batch_job().pod(0).pod(1, phase="Pending", node=None, topology=None)
    decision = scene.decide()
    assert deeds(decision) == []
    assert (decision.status.attempt_job_uid, decision.status.attempt_start_time) == ("job-1", None)
    assert running_reason(decision) == "WaitingForPods"
    assert (decision.status.ready, decision.status.phase) == ("0/2", "Pending")


def test_training() -> None:
    decision = Scene().running().trainer(step=40, loss=2.5, tokens_per_second=1e4).decide()
    assert deeds(decision) == []
    assert (decision.status.ready, decision.status.pods_ready, decision.status.phase) == ("2/2", 2, "Running")
    assert condition(decision, ConditionType.RUNNING).status is ConditionStatus.TRUE
    assert condition(decision, ConditionType.PODS_READY).status is ConditionStatus.TRUE
    training = decision.status.training
    assert training is not None
    assert (training.step, training.loss, training.tokens_per_second) == (40, 2.5, 1e4)


@pytest.mark.parametrize(
    ("pod", "seconds"),
    [
        ({}, 60),
        ({"phase": "Failed", "exit_code": 76, "finished_time": ago(1)}, 10),
        ({"deletion_time": ago(20)}, 40),
    ],
)
def test_looks_again_when_something_will_be_due(pod: dict[str, Any], seconds: float) -> None:
    scene = Scene().recorded(attempt=1, attempt_job_uid="job-1").batch_job().pod(0).pod(1, **pod)
    assert scene.decide().requeue_after_seconds == seconds


def test_start_counts_from_when_all_pods_first_ran() -> None:
    scene = Scene().running().recorded(attempt_start_time=None)
    assert scene.decide().status.attempt_start_time == NOW
    assert Scene().running(seconds=60).decide().status.attempt_start_time == ago(60)


@pytest.mark.parametrize("speaker", [{"uid": "another"}, {"attempt": 2}])
def test_a_stranger_at_rank_zeros_address_is_not_believed(speaker: dict[str, Any]) -> None:
    decision = Scene().running().with_(trainer=a_trainer(**speaker)).decide()
    assert decision.status.training is None


def test_numbers_survive_a_trainer_that_only_starts() -> None:
    known = TrainingProgress(step=70, loss=2.0)
    scene = Scene().running(attempt=2).recorded(training=known, checkpoint=a_checkpoint(50))
    decision = scene.trainer(step=0, phase=TrainerPhase.RESTORING).decide()
    assert decision.status.training == known
    assert decision.status.checkpoint == a_checkpoint(50)
    resumed = scene.trainer(step=51).decide().status.training
    assert resumed is not None
    assert resumed.step == 51, "a new attempt goes on from the checkpoint, and that is the truth"


def test_a_notice_of_the_trainer_reaches_the_condition() -> None:
    notice = "step-100 is damaged (sha of a.safetensors), restored step-50"
    decision = Scene().running().trainer(notices=["older", notice], restored_from="s3://b/step-50").decide()
    message = condition(decision, ConditionType.RUNNING).message
    assert message == f"Attempt 1 is running, restored from s3://b/step-50; {notice}"


def test_each_notice_is_one_event_and_stays_on_the_resource() -> None:
    scene = Scene().running().trainer(notices=["older", "a long story"])
    first = scene.decide()
    assert [e for e in events(first) if e[1] == "Notice"] == [("Warning", "Notice")] * 2
    scene.recorded(**dict(first.status)).trainer(notices=["older", "a long", "newer"])  # one cut, one new
    second = scene.decide()
    assert [action.message for action in second.actions if isinstance(action, EmitEvent)] == ["newer"]
    assert second.status.training is not None
    assert second.status.training.notices == ["older", "a long", "newer"]


def test_what_training_left_is_shown() -> None:
    final = a_trainer(step=100, sample="def main" * 1000, export_uri="s3://b/export")
    scene = Scene(nodes=1).recorded(attempt=1, attempt_start_time=ago(60)).batch_job(complete=True)
    training = scene.pod(0, phase="Succeeded", message=a_report(0, "Succeeded", final=final)).decide().status.training
    assert training is not None
    assert training.export_uri == "s3://b/export"
    assert training.sample == "def main" * 250


def test_last_words_count_more_than_an_answer_of_the_same_step() -> None:
    """Rank 0 was asked after its last step, but before the export."""
    final = a_trainer(step=100, export_uri="s3://b/export")
    scene = Scene(nodes=1).recorded(attempt=1, attempt_start_time=ago(60)).batch_job(complete=True).trainer(step=100)
    training = scene.pod(0, phase="Succeeded", message=a_report(0, "Succeeded", final=final)).decide().status.training
    assert training is not None
    assert training.export_uri == "s3://b/export"


@pytest.mark.parametrize(
    ("gate", "column"),
    [
        (None, ""),
        (GateReport(decision=GateDecision.GATED, ratio=0.3125), "0.31"),
        (GateReport(decision=GateDecision.PLAIN, ratio=1), "plain"),
    ],
)
def test_the_gate_is_a_column_and_a_part_of_training(gate: GateReport | None, column: str) -> None:
    status = Scene().running().trainer(gate=gate, skipped_steps=3).decide().status
    assert status.training is not None
    assert (status.gate, status.training.gate, status.training.skipped_steps) == (column, gate, 3)


def test_histograms_stay_off_the_resource() -> None:
    counts = Histogram(bounds=[1], counts=[1, 0], sum=1)
    difficulty = DifficultyReport(gradient_norm=counts, entropy=counts)
    training = Scene().running().trainer(difficulty=difficulty).decide().status.training
    assert training is not None
    assert "difficulty" not in training.to_wire()


def test_figures_on_the_resource_are_rounded() -> None:
    training = Scene().running().trainer(loss=2.123456789, tokens_per_second=5120.123456).decide().status.training
    assert training is not None
    assert (training.loss, training.tokens_per_second) == (2.1235, 5120.1235)
    gate = GateReport(decision=GateDecision.GATED, reason="r" * 9000, ratio=0.5, retained_mass=0.912345678)
    training = Scene().running().trainer(gate=gate).decide().status.training
    assert training is not None
    assert training.gate is not None
    assert (training.gate.retained_mass, len(training.gate.reason)) == (0.9123, 2000)


@pytest.mark.parametrize(
    ("training", "checkpoint", "status", "reason"),
    [
        ({}, None, "False", "NoneYet"),
        ({"checkpoint": None}, None, "False", "CheckpointsOff"),
        ({}, a_checkpoint(50), "True", "Committed"),
    ],
)
def test_checkpoint_ready(training: dict[str, Any], checkpoint: Any, status: str, reason: str) -> None:
    decision = Scene(training=training).running().recorded(checkpoint=checkpoint).decide()
    found = condition(decision, ConditionType.CHECKPOINT_READY)
    assert (found.status, found.reason) == (status, reason)


def saving(committed: int = 0, failed_in_row: int = 0, failure: str = "") -> dict[str, Any]:
    """A trainer's word on its saves, among its others."""
    return {"saves": SaveReport(committed=committed, failed_in_row=failed_in_row, failure=failure)}


FULL = "cannot write s3://bucket/runs/demo: no space left there"


@pytest.mark.parametrize(
    ("saves", "known", "message"),
    [
        (
            saving(3, 1, FULL),
            a_checkpoint(50),
            f"The last checkpoint could not be saved: {FULL}; newest committed: Step 50 at s3://bucket/runs/step-50",
        ),
        (
            saving(0, 4, f"a line above\n{FULL}"),
            None,
            f"The last 4 checkpoints could not be saved: {FULL}; none has ever been committed",
        ),
    ],
)
def test_failing_saves_are_told_with_the_stores_words(saves: dict[str, Any], known: Any, message: str) -> None:
    decision = Scene().running().recorded(checkpoint=known).trainer(**saves).decide()
    found = condition(decision, ConditionType.CHECKPOINT_READY)
    assert (found.status, found.reason, found.message) == ("False", "SavesFail", message)
    assert ("Warning", "SavesFail") in events(decision)


def test_a_run_of_failing_saves_is_one_event_and_ends_with_the_next_commit_even_of_a_later_attempt() -> None:
    scene = Scene().running().recorded(checkpoint=a_checkpoint(50)).trainer(**saving(1, 1, FULL))
    first = scene.decide()
    row = Scene().running().recorded(**dict(first.status)).trainer(**saving(1, 2, FULL)).decide()
    assert not {"SavesFail", "Committed"} & {reason for _, reason in events(row)}
    assert "The last 2 checkpoints" in condition(row, ConditionType.CHECKPOINT_READY).message

    again = Scene().recorded(**dict(row.status)).running(attempt=2).trainer(**saving(0)).decide()
    assert condition(again, ConditionType.CHECKPOINT_READY).reason == "SavesFail", "nothing has shown that it is over"
    saved = Scene().recorded(**dict(again.status)).running(attempt=2)
    decision = saved.trainer(**saving(1), checkpoint=a_checkpoint(60)).decide()
    found = condition(decision, ConditionType.CHECKPOINT_READY)
    assert (found.status, found.reason) == ("True", "Committed")
    assert ("Normal", "Committed") in events(decision)


def test_the_condition_tells_step_place_size_and_time_of_the_newest_checkpoint_and_not_its_age() -> None:
    checkpoint = CheckpointReport(step=50, uri="s3://b/step-50", size_bytes=1_234_000_000, committed_time=ago(600))
    scene = Scene().running().trainer(checkpoint=checkpoint)
    decision = scene.decide()
    said = condition(decision, ConditionType.CHECKPOINT_READY).message
    assert said == "Step 50 at s3://b/step-50, 1.2 GB, committed at 2026-03-01 11:50:00 UTC"
    assert decision.status.checkpoint == checkpoint
    assert condition(scene.decide(ago(-3600)), ConditionType.CHECKPOINT_READY).message == said


@pytest.mark.parametrize(
    ("known", "told", "newest"),
    [
        ((1, 50), (1, 60), (1, 60)),
        ((1, 60), (1, 50), (1, 60)),
        ((1, 60), (2, 50), (2, 50)),
        ((2, 50), (1, 60), (2, 50)),
    ],
)
def test_a_later_attempts_checkpoint_is_newer(
    known: tuple[int, int], told: tuple[int, int], newest: tuple[int, int]
) -> None:
    """It went on from the newest whole one, so that what lies ahead of it belongs to a past that was damaged."""
    recorded, report = (CheckpointReport(attempt=attempt, step=step, uri="u") for attempt, step in (known, told))
    found = Scene().running(attempt=2).recorded(checkpoint=recorded).trainer(checkpoint=report).decide()
    assert found.status.checkpoint is not None
    assert (found.status.checkpoint.attempt, found.status.checkpoint.step) == newest


def test_pods_on_a_node_learn_their_topology_once() -> None:
    scene = Scene().recorded(attempt=1).batch_job()
    scene.pod(0, topology=None).pod(1, topology=None, node=None)
    assert deeds(scene.decide()) == [AnnotateTopology("demo-a1-0", "pod-1-0", "node-0")]


@pytest.mark.parametrize("broken", ["Service", "edited"])
def test_what_is_missing_or_edited_is_applied_again(broken: str) -> None:
    scene = Scene().recorded(attempt=1).batch_job(edited=broken == "edited").pod(0).pod(1)
    if broken == "Service":
        scene.with_(missing_children=frozenset({"Service"}))
    assert deeds(scene.decide()) == [CreateAttempt(1)]


def test_a_failure_and_the_next_number_are_one_write_and_nothing_is_deleted_yet() -> None:
    decision = Scene().failing(70, 76).decide()
    status = decision.status
    assert deeds(decision) == []
    assert decision.requeue_after_seconds == 0
    assert (status.attempt, status.attempt_job_uid, status.restarts) == (2, None, 1)
    assert [(f.attempt, f.reason, f.exit_code) for f in status.failures] == [(1, "Internal", 70)]
    assert status.next_attempt_time == ago(0), "the first restart is at once"
    assert status.active_seconds == 40, "until the pod died, not until it was noticed"
    assert events(decision) == [("Warning", "BackingOff")]
    assert (status.phase, status.ready) == ("Restarting", "0/2")


def test_failures_are_bounded() -> None:
    past = [FailureRecord(attempt=n, reason="Internal", step=n, time=ago(100)) for n in range(1, 11)]
    status = Scene().failing(70, attempt=11).recorded(failures=past).decide().status
    assert [failure.attempt for failure in status.failures] == list(range(2, 12))


def test_a_user_error_ends_the_job_in_the_trainers_own_words() -> None:
    words = "training.data.train: 's3://b/*.txt' matches nothing; check the glob"
    scene = Scene(nodes=1).failing(65, message=a_report(65, "BadData", words))
    decision = scene.decide()
    assert verdict(decision) == ("False", "UserError")
    assert condition(decision, ConditionType.SUCCEEDED).message == words
    assert (decision.status.attempt, decision.status.phase) == (1, "Failed")
    assert decision.status.completion_time == NOW
    assert events(decision)[-1] == ("Warning", "UserError")


def test_a_budget_used_up_says_so() -> None:
    past = [FailureRecord(attempt=1, reason="Internal", step=7, time=ago(100))]
    scene = Scene(failure_policy=FailurePolicy(max_restarts=1)).failing(70, attempt=2)
    scene.recorded(failures=past, restarts=1, restarts_without_progress=1, training=TrainingProgress(step=7))
    decision = scene.decide()
    assert verdict(decision) == ("False", "NoProgress")
    assert condition(decision, ConditionType.SUCCEEDED).message.startswith("1 restarts died at step 7 without")
    assert decision.status.restarts == 1, "no restart follows, so none is counted"


def test_complete() -> None:
    final = a_trainer(step=100, checkpoint=a_checkpoint(100))
    scene = Scene(nodes=1).recorded(attempt=1, attempt_start_time=ago(60)).batch_job(complete=True)
    decision = scene.pod(0, phase="Succeeded", message=a_report(0, "Succeeded", final=final)).decide()
    assert verdict(decision) == ("True", "Completed")
    assert (decision.status.completion_time, decision.status.active_seconds) == (NOW, 60)
    assert decision.status.checkpoint == a_checkpoint(100)
    assert decision.status.phase == "Succeeded"
    assert ("Normal", "Completed") in events(decision)


def test_completion_wins_over_deadline_and_suspend() -> None:
    scene = Scene(suspend=True, active_deadline_seconds=1).recorded(attempt=1, active_seconds=99)
    assert verdict(scene.batch_job(complete=True).decide()) == ("True", "Completed")


def test_deadline_is_recorded_first_and_deleted_then() -> None:
    scene = Scene(active_deadline_seconds=60).running(seconds=60)
    decision = scene.decide()
    assert verdict(decision) == ("False", "DeadlineExceeded")
    assert deeds(decision) == []
    after = scene.recorded(**dict(decision.status)).decide()
    assert deeds(after) == [DELETE_1]
    assert events(after) == []


def test_looks_again_when_the_deadline_comes() -> None:
    assert Scene(active_deadline_seconds=62).running(seconds=60).decide().requeue_after_seconds == 2


def test_finished_job_keeps_its_record_and_its_pods() -> None:
    scene = Scene().failing(78, 76)
    ended = scene.recorded(**dict(scene.decide().status)).decide()
    assert deeds(ended) == []
    assert ended.requeue_after_seconds is None
    assert verdict(ended) == ("False", "UserError")
    again = scene.edited(suspend=True).decide()
    assert again.status.phase == "Failed", "an ended job does not suspend"


def test_ttl() -> None:
    scene = Scene(ttl_seconds_after_finished=100).failing(78, 76)
    scene.recorded(**dict(scene.decide().status))
    assert scene.decide().requeue_after_seconds == 100
    assert deeds(scene.decide(ago(-99))) == []
    assert deeds(scene.decide(ago(-100))) == [DeleteJob(UID)]


def test_suspended_from_the_start_has_no_objects() -> None:
    decision = Scene(suspend=True).decide()
    assert deeds(decision) == []
    assert (decision.status.attempt, decision.status.phase) == (0, "Suspended")
    assert condition(decision, ConditionType.SUSPENDED).status is ConditionStatus.TRUE
    assert decision.requeue_after_seconds is None


def test_suspend_asks_once_then_waits_then_stops() -> None:
    scene = Scene(suspend=True).running().trainer(step=40)
    asked = scene.decide()
    assert deeds(asked) == [RequestCheckpoint("10.0.1.0")]
    assert (asked.status.suspend_requested_time, asked.status.suspend_step) == (NOW, 40)
    assert (running_reason(asked), asked.status.phase) == ("SavingBeforeSuspend", "Suspending")

    waiting = scene.recorded(**dict(asked.status)).decide(ago(-5))
    assert deeds(waiting) == []
    assert waiting.status.attempt == 1

    saved = scene.trainer(step=45, checkpoint=a_checkpoint(42)).decide(ago(-10))
    assert deeds(saved) == []
    assert (saved.status.attempt, saved.status.restarts) == (2, 0)
    assert saved.status.active_seconds == 70

    stopping = scene.recorded(**dict(saved.status)).decide(ago(-10))
    assert deeds(stopping) == [DELETE_1]
    assert condition(stopping, ConditionType.SUSPENDED).status is ConditionStatus.FALSE


@pytest.mark.parametrize(
    "scene",
    [
        Scene(suspend=True).recorded(attempt=1).batch_job(),
        Scene(suspend=True).recorded(attempt=1).batch_job().pod(0).pod(1, phase="Pending"),
        Scene(suspend=True, checkpoint_timeout_seconds=0).running().trainer(),
    ],
)
def test_suspend_stops_at_once_where_there_is_nothing_to_save(scene: Scene) -> None:
    decision = scene.decide()
    assert deeds(decision) == []
    assert (decision.status.attempt, running_reason(decision)) == (2, "Stopping")


def test_suspend_right_after_the_operator_started_still_asks() -> None:
    decision = Scene(suspend=True).running().recorded(checkpoint=a_checkpoint(40)).decide()
    assert deeds(decision) == [RequestCheckpoint("10.0.1.0")]
    assert decision.status.suspend_step == 41


def test_suspend_taken_back_while_waiting() -> None:
    scene = Scene().running().recorded(suspend_requested_time=ago(5), suspend_step=40).trainer(step=44)
    decision = scene.decide()
    assert deeds(decision) == []
    assert (decision.status.attempt, decision.status.suspend_requested_time) == (1, None)


def test_suspend_while_backing_off_stops_the_wait() -> None:
    decision = Scene(suspend=True).recorded(attempt=2, next_attempt_time=ago(-20)).decide()
    assert (decision.status.phase, decision.status.attempt) == ("Suspended", 2)


def test_another_controllers_job_is_left_alone() -> None:
    scene = Scene(managed_by="kueue.x-k8s.io/multikueue").running()
    decision = scene.decide()
    assert decision.actions == ()
    assert decision.status is scene.job.status


@pytest.mark.parametrize("ending", ["job", "namespace"])
def test_nothing_is_created_in_what_is_being_deleted(ending: str) -> None:
    scene = Scene().recorded(attempt=1).pod(0, deletion_time=ago(90))
    if ending == "job":
        scene.metadata(deletion_timestamp=ago(1))
    decision = scene.with_(namespace_terminating=ending == "namespace").decide()
    assert decision.actions == (ForceDeletePod("demo-a1-0", "pod-1-0"),)
    assert decision.status is scene.job.status


@pytest.mark.parametrize(
    "scene",
    [
        Scene().running().trainer(step=40),
        Scene(suspend=True),
        Scene().recorded(attempt=2, next_attempt_time=ago(-20)),
        Scene().recorded(attempt=2).batch_job(1),
        Scene().recorded(attempt=1),
    ],
)
def test_looking_twice_changes_nothing(scene: Scene) -> None:
    first = scene.decide()
    second = scene.recorded(**dict(first.status)).decide(ago(-1))
    assert second.status == first.status
    assert events(second) == []
    assert deeds(second) == deeds(first)


def test_an_invalid_spec_ends_a_job_that_does_not_run() -> None:
    refusal = Refused(Reason.INVALID_SPEC, "spec.template.spec.containers: should be a list (got 1)")
    decision = refuse(Scene().recorded(attempt=1).observed(), refusal, NOW)
    assert verdict(decision) == ("False", "InvalidSpec")
    assert condition(decision, ConditionType.SUCCEEDED).message == refusal.message


@pytest.mark.parametrize("reason", [Reason.INVALID_SPEC, Reason.FORBIDDEN])
def test_a_refusal_leaves_a_running_job_running(reason: Reason) -> None:
    scene = Scene().running().with_(missing_children=frozenset({"Service"}))
    decision = refuse(scene.observed(), Refused(reason, "no"), NOW)
    assert verdict(decision) == ("Unknown", "InProgress")
    running = condition(decision, ConditionType.RUNNING)
    assert (running.status, running.reason, running.message) == ("True", "Training", "no")
    assert decision.status.attempt == 1


def test_a_refused_clean_up_leaves_the_verdict() -> None:
    scene = Scene(active_deadline_seconds=60).running(seconds=60)
    ended = scene.decide()
    decision = refuse(scene.recorded(**dict(ended.status)).observed(), Refused(Reason.FORBIDDEN, "no"), NOW)
    assert decision.status == ended.status
    assert decision.requeue_after_seconds == 60


def test_a_forbidden_job_is_tried_again() -> None:
    refusal = Refused(Reason.FORBIDDEN, "exceeded quota: gpus")
    decision = refuse(Scene().recorded(attempt=1).observed(), refusal, NOW)
    assert verdict(decision) == ("Unknown", "InProgress")
    assert decision.requeue_after_seconds == 60
    assert decision.status.phase == "Pending"
