"""What one stage of a job's life decides, and how it becomes a Decision: conditions, columns and events.

The stages (see plan) say where the job stands and why, once; nothing else sets a condition or emits an event.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pylon_api.job import PylonJobStatus, TrainingProgress
from pylon_api.names import ConditionType, Reason
from pylon_operator import messages
from pylon_operator.conditions import (
    FALSE,
    TRUE,
    UNKNOWN,
    State,
    find,
    phase,
    set_conditions,
    transitions,
)
from pylon_operator.observation import Action, Decision, EmitEvent
from pylon_operator.situation import Situation
from pylon_operator.waiting import explain

RUNNING_REASONS = frozenset({Reason.TRAINING, Reason.SAVING_BEFORE_SUSPEND})


@dataclass(frozen=True, slots=True)
class Outcome:
    """One stage's decision."""

    status: PylonJobStatus
    """The status to record, but for what `conclude` derives."""
    reason: Reason
    """Of Running, and of Succeeded at the end."""
    message: str
    actions: tuple[Action, ...] = ()
    requeue: float | None = None
    """Seconds; 0 looks again at once."""
    ended: bool = False
    suspended: bool = False


def conclude(s: Situation, outcome: Outcome) -> Decision:
    """The decision of an outcome, with its conditions, columns and events."""
    same_attempt = outcome.status.attempt == s.status.attempt
    ready, waiting = (s.ready, explain(s)) if same_attempt else (0, None)
    nodes, generation = s.job.spec.nodes, s.job.metadata.generation
    states = [
        _suspended(s, outcome),
        _pods_ready(ready, nodes, waiting),
        State(
            ConditionType.RUNNING,
            TRUE if outcome.reason in RUNNING_REASONS else FALSE,
            outcome.reason,
            outcome.message,
        ),
        _checkpoint_ready(s, outcome.status),
        _succeeded(outcome),
    ]
    before = s.status.conditions
    after = set_conditions(before, states, generation, s.now)
    derived = {
        "observed_generation": generation,
        "conditions": after,
        "phase": phase(after),
        "pods_ready": ready,
        "ready": f"{ready}/{nodes}",
        "gate": training.gate.summary if (training := outcome.status.training) and training.gate else "",
    }
    status = outcome.status.model_copy(update=derived)
    events = (*transitions(before, after), *_notices(s.job.status.training, status.training))
    return Decision(status, (*outcome.actions, *events), outcome.requeue)


def _suspended(s: Situation, outcome: Outcome) -> State:
    if outcome.suspended:
        return State(ConditionType.SUSPENDED, TRUE, Reason.SUSPENDED_BY_USER, messages.SUSPENDED)
    last = find(s.status.conditions, ConditionType.SUSPENDED)
    if last and last.reason in (Reason.SUSPENDED_BY_USER, Reason.RESUMED):
        return State(ConditionType.SUSPENDED, FALSE, Reason.RESUMED, messages.RESUMED)
    return State(ConditionType.SUSPENDED, FALSE, Reason.NOT_SUSPENDED, messages.NOT_SUSPENDED)


def _pods_ready(ready: int, nodes: int, waiting: str | None) -> State:
    message = messages.pods_ready(ready, nodes, waiting)
    if ready == nodes:
        return State(ConditionType.PODS_READY, TRUE, Reason.ALL_PODS_READY, message)
    return State(ConditionType.PODS_READY, FALSE, Reason.PODS_NOT_READY, message)


def _checkpoint_ready(s: Situation, status: PylonJobStatus) -> State:
    type_ = ConditionType.CHECKPOINT_READY
    saves = status.training.saves if status.training else None
    last = find(s.status.conditions, type_)
    if saves and saves.failed_in_row:
        return State(type_, FALSE, Reason.SAVES_FAIL, messages.saves_fail(saves, status.checkpoint))
    if last and last.reason == Reason.SAVES_FAIL and not (saves and saves.committed):
        return State(type_, FALSE, Reason.SAVES_FAIL, last.message)  # the next attempt has yet to do better
    if status.checkpoint:
        return State(type_, TRUE, Reason.COMMITTED, messages.committed(status.checkpoint))
    if s.job.spec.training.checkpoint:
        return State(type_, FALSE, Reason.NONE_YET, messages.NO_CHECKPOINT_YET)
    return State(type_, FALSE, Reason.CHECKPOINTS_OFF, messages.CHECKPOINTS_OFF)


def _succeeded(outcome: Outcome) -> State:
    if not outcome.ended:
        return State(ConditionType.SUCCEEDED, UNKNOWN, Reason.IN_PROGRESS, messages.IN_PROGRESS)
    status = TRUE if outcome.reason is Reason.COMPLETED else FALSE
    return State(ConditionType.SUCCEEDED, status, outcome.reason, outcome.message)


def _notices(before: TrainingProgress | None, after: TrainingProgress | None) -> Iterator[EmitEvent]:
    """One event for each notice that is not on record yet; a termination message may repeat its beginning."""
    known = before.notices if before else []
    for notice in after.notices if after else []:
        if not any(told.startswith(notice) for told in known):
            yield EmitEvent("Warning", Reason.NOTICE, notice)
