"""Turns where a job stands into conditions, the columns made from them, and the events that tell of each transition.

Programs read conditions; `phase` and `ready` are for people and are derived from the same facts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from pylon_api.job import Condition, ConditionStatus
from pylon_api.names import ConditionType, Reason
from pylon_operator.observation import EmitEvent

TRUE, FALSE, UNKNOWN = ConditionStatus.TRUE, ConditionStatus.FALSE, ConditionStatus.UNKNOWN

MAX_MESSAGE_LENGTH = 4096
"""Of a condition. Messages hold words of others, and the schema refuses what is too long."""

QUIET = frozenset(
    {
        Reason.NOT_SUSPENDED,
        Reason.PODS_NOT_READY,
        Reason.CHECKPOINTS_OFF,
        Reason.NONE_YET,
        Reason.IN_PROGRESS,
    }
)
"""Where conditions start, or what another condition's transition tells better: no event."""

WARNINGS = frozenset(
    {
        Reason.BACKING_OFF,
        Reason.CHECKPOINT_TIMED_OUT,
        Reason.SAVES_FAIL,
        Reason.INVALID_SPEC,
        Reason.USER_ERROR,
        Reason.FAILED_BY_RULE,
        Reason.NO_PROGRESS,
        Reason.RESTARTS_EXHAUSTED,
        Reason.DEADLINE_EXCEEDED,
        Reason.FORBIDDEN,
    }
)

PHASES = {
    Reason.CREATED: "Pending",
    Reason.WAITING_FOR_PODS: "Pending",
    Reason.TRAINING: "Running",
    Reason.RESTARTING: "Restarting",
    Reason.BACKING_OFF: "Restarting",
    Reason.SAVING_BEFORE_SUSPEND: "Suspending",
    Reason.STOPPING: "Suspending",
    Reason.CHECKPOINT_TIMED_OUT: "Suspending",
}


@dataclass(frozen=True, slots=True)
class State:
    """One condition before it has a history."""

    type: ConditionType
    status: ConditionStatus
    reason: Reason
    message: str


def find(conditions: Sequence[Condition], type_: ConditionType) -> Condition | None:
    """The condition of this type."""
    return next((condition for condition in conditions if condition.type == type_), None)


def set_conditions(
    before: Sequence[Condition], states: Sequence[State], generation: int, now: datetime
) -> list[Condition]:
    """`states` as conditions; the transition time moves only when the condition's status does."""
    old = {condition.type: condition for condition in before}
    conditions = []
    for state in states:
        previous = old.get(state.type)
        unmoved = previous is not None and previous.status == state.status
        conditions.append(
            Condition(
                type=state.type,
                status=state.status,
                reason=state.reason,
                message=state.message[:MAX_MESSAGE_LENGTH],
                last_transition_time=previous.last_transition_time if previous and unmoved else now,
                observed_generation=generation,
            )
        )
    return conditions


def phase(conditions: Sequence[Condition]) -> str:
    """One word for people, from the conditions."""
    succeeded = find(conditions, ConditionType.SUCCEEDED)
    suspended = find(conditions, ConditionType.SUSPENDED)
    running = find(conditions, ConditionType.RUNNING)
    if succeeded and succeeded.status is not UNKNOWN:
        return "Succeeded" if succeeded.status is TRUE else "Failed"
    if suspended and suspended.status is TRUE:
        return "Suspended"
    return PHASES.get(Reason(running.reason), "Pending") if running else "Pending"


def transitions(before: Sequence[Condition], after: Sequence[Condition]) -> tuple[EmitEvent, ...]:
    """One event for each reason that is new; two conditions with one reason tell it once."""
    old = {condition.type: condition.reason for condition in before}
    events: dict[str, EmitEvent] = {}
    for condition in after:
        if condition.reason != old.get(condition.type) and condition.reason not in QUIET:
            kind = "Warning" if condition.reason in WARNINGS else "Normal"
            events.setdefault(condition.reason, EmitEvent(kind, condition.reason, condition.message))
    return tuple(events.values())
