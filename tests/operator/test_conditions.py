"""History of conditions, the phase, and events on transitions only."""

from __future__ import annotations

from datetime import datetime

import pytest
from operator_builders import NOW, ago

from pylon_api.job import Condition, ConditionStatus
from pylon_api.names import ConditionType, Reason
from pylon_operator.conditions import FALSE, TRUE, UNKNOWN, State, phase, set_conditions, transitions

RUNNING = ConditionType.RUNNING
WAITING = State(RUNNING, FALSE, Reason.WAITING_FOR_PODS, "1 of 2")
TRAINING = State(RUNNING, TRUE, Reason.TRAINING, "attempt 1")


def at(time: datetime, *states: State) -> list[Condition]:
    return set_conditions([], states, 1, time)


@pytest.mark.parametrize(
    ("state", "since"),
    [
        (WAITING, ago(60)),
        (State(RUNNING, FALSE, Reason.BACKING_OFF, "other words"), ago(60)),
        (TRAINING, NOW),
        (State(ConditionType.SUSPENDED, FALSE, Reason.NOT_SUSPENDED, ""), NOW),
    ],
)
def test_transition_time_moves_with_the_status_only(state: State, since: datetime) -> None:
    (changed,) = set_conditions(at(ago(60), WAITING), [state], 7, NOW)
    assert changed.last_transition_time == since
    assert changed.observed_generation == 7
    assert (changed.reason, changed.message) == (state.reason, state.message)


@pytest.mark.parametrize(
    ("before", "after", "events"),
    [
        ([], [WAITING], [("Normal", "WaitingForPods")]),
        ([WAITING], [State(RUNNING, FALSE, Reason.WAITING_FOR_PODS, "2 of 2")], []),
        ([WAITING], [TRAINING], [("Normal", "Training")]),
        ([TRAINING], [State(RUNNING, FALSE, Reason.BACKING_OFF, "x")], [("Warning", "BackingOff")]),
        ([], [State(ConditionType.SUCCEEDED, UNKNOWN, Reason.IN_PROGRESS, "")], []),
        (
            [TRAINING],
            [
                State(RUNNING, FALSE, Reason.COMPLETED, "done"),
                State(ConditionType.SUCCEEDED, TRUE, Reason.COMPLETED, "done"),
            ],
            [("Normal", "Completed")],
        ),
    ],
)
def test_events_tell_new_reasons_once(before: list[State], after: list[State], events: list[tuple[str, str]]) -> None:
    told = transitions(at(ago(60), *before), at(NOW, *after))
    assert [(event.type, event.reason) for event in told] == events


@pytest.mark.parametrize(
    ("running", "suspended", "succeeded", "word"),
    [
        (Reason.CREATED, FALSE, UNKNOWN, "Pending"),
        (Reason.WAITING_FOR_PODS, FALSE, UNKNOWN, "Pending"),
        (Reason.TRAINING, FALSE, UNKNOWN, "Running"),
        (Reason.BACKING_OFF, FALSE, UNKNOWN, "Restarting"),
        (Reason.STOPPING, FALSE, UNKNOWN, "Suspending"),
        (Reason.SUSPENDED_BY_USER, TRUE, UNKNOWN, "Suspended"),
        (Reason.FORBIDDEN, FALSE, UNKNOWN, "Pending"),
        (Reason.COMPLETED, FALSE, TRUE, "Succeeded"),
        (Reason.NO_PROGRESS, FALSE, FALSE, "Failed"),
    ],
)
def test_phase(running: Reason, suspended: ConditionStatus, succeeded: ConditionStatus, word: str) -> None:
    states = [
        State(ConditionType.SUSPENDED, suspended, Reason.NOT_SUSPENDED, ""),
        State(RUNNING, FALSE, running, ""),
        State(ConditionType.SUCCEEDED, succeeded, running, ""),
    ]
    assert phase(at(NOW, *states)) == word
