"""Jobs and observations for the operator's tests, with only what a test is about spelt out."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Self

from pylon_api import names
from pylon_api.job import Condition, PylonJob
from pylon_api.names import ConditionType
from pylon_api.run import CheckpointReport, TerminationReport, TrainerPhase, TrainerStatus
from pylon_operator.conditions import find
from pylon_operator.observation import Action, AttemptView, Decision, EmitEvent, Observed, PodView
from pylon_operator.plan import plan

UID = "5f3a9c1e-0000-4000-8000-000000000001"
NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
CHECKPOINTS = {"uri": "s3://bucket/runs"}


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def a_job(*, name: str = "demo", training: dict[str, Any] | None = None, **spec: Any) -> PylonJob:
    """A job of two CPU nodes that saves checkpoints; `spec` and `training` in Python's spelling override."""
    recipe = {"data": {"train": ["/data/*.txt"]}, "schedule": {"steps": 100}, "checkpoint": CHECKPOINTS}
    recipe |= training or {}
    metadata = {"name": name, "namespace": "team", "uid": UID, "generation": 1}
    return PylonJob.model_validate(
        {
            "api_version": names.API_VERSION,
            "kind": names.KIND,
            "metadata": metadata,
            "spec": {"nodes": 2, "training": recipe} | spec,
        }
    )


def a_checkpoint(step: int, attempt: int = 1) -> CheckpointReport:
    return CheckpointReport(step=step, attempt=attempt, uri=f"s3://bucket/runs/step-{step}")


def a_trainer(attempt: int = 1, step: int = 10, **fields: Any) -> TrainerStatus:
    return TrainerStatus(**{"uid": UID, "attempt": attempt, "phase": TrainerPhase.TRAINING, "step": step} | fields)


def a_report(exit_code: int, reason: str, message: str = "", final: TrainerStatus | None = None) -> str:
    """A termination message as the launcher writes it."""
    return TerminationReport(exit_code=exit_code, reason=reason, message=message, final=final).model_dump_json(
        by_alias=True
    )


class Scene:
    """An observation, built fluently; `decide` plans it."""

    def __init__(self, **spec: Any) -> None:
        self.job = a_job(**spec)
        self._attempts: list[AttemptView] = []
        self._pods: list[PodView] = []
        self._more: dict[str, Any] = {}

    def recorded(self, **status: Any) -> Self:
        """Fields of the status as last written."""
        self.job = self.job.model_copy(update={"status": self.job.status.model_copy(update=status)})
        return self

    def edited(self, **spec: Any) -> Self:
        """The spec changed."""
        self.job = self.job.model_copy(update={"spec": self.job.spec.model_copy(update=spec)})
        return self

    def metadata(self, **fields: Any) -> Self:
        self.job = self.job.model_copy(update={"metadata": self.job.metadata.model_copy(update=fields)})
        return self

    def batch_job(self, attempt: int = 1, **fields: Any) -> Self:
        defaults = {"name": f"demo-a{attempt}", "uid": f"job-{attempt}", "attempt": attempt}
        self._attempts.append(AttemptView(**defaults | fields))
        return self

    def pod(self, index: int, attempt: int = 1, **fields: Any) -> Self:
        defaults = {
            "name": f"demo-a{attempt}-{index}",
            "uid": f"pod-{attempt}-{index}",
            "attempt": attempt,
            "index": index,
            "job_uid": f"job-{attempt}",
            "phase": "Running",
            "node": f"node-{index}",
            "ip": f"10.0.{attempt}.{index}",
            "topology": "[]",
        }
        self._pods.append(PodView(**defaults | fields))
        return self

    def running(self, attempt: int = 1, seconds: float = 60) -> Self:
        """Attempt `attempt` on record, its Job, and all its pods running and ready for so long."""
        self.recorded(attempt=attempt, attempt_job_uid=f"job-{attempt}", attempt_start_time=ago(seconds))
        self.batch_job(attempt)
        for index in range(self.job.spec.nodes):
            self.pod(index, attempt, ready=True)
        return self

    def failing(self, *exit_codes: int | None, attempt: int = 1, **fields: Any) -> Self:
        """Attempt `attempt` on record with pods that ended with these codes one second apart; its Job failed."""
        self.recorded(attempt=attempt, attempt_job_uid=f"job-{attempt}", attempt_start_time=ago(60))
        self.batch_job(attempt, failed=True, reason="BackoffLimitExceeded")
        for index, code in enumerate(exit_codes):
            ended = {"phase": "Failed", "exit_code": code, "finished_time": ago(20 - index)}
            self.pod(index, attempt, **ended | fields)
        return self

    def trainer(self, step: int = 10, **fields: Any) -> Self:
        self._more["trainer"] = a_trainer(self.job.status.attempt, step, **fields)
        return self

    def with_(self, **fields: Any) -> Self:
        """Other fields of the observation."""
        self._more |= fields
        return self

    def observed(self) -> Observed:
        return Observed(self.job, tuple(self._attempts), tuple(self._pods), **self._more)

    def decide(self, now: datetime = NOW) -> Decision:
        return plan(self.observed(), now)


def deeds(decision: Decision) -> list[Action]:
    """The actions without the events."""
    return [action for action in decision.actions if not isinstance(action, EmitEvent)]


def events(decision: Decision) -> list[tuple[str, str]]:
    return [(a.type, a.reason) for a in decision.actions if isinstance(a, EmitEvent)]


def condition(decision: Decision, type_: ConditionType) -> Condition:
    found = find(decision.status.conditions, type_)
    assert found is not None, f"no condition {type_}"
    return found


def verdict(decision: Decision) -> tuple[str, str]:
    """Status and reason of Succeeded."""
    succeeded = condition(decision, ConditionType.SUCCEEDED)
    return succeeded.status, succeeded.reason


def running_reason(decision: Decision) -> str:
    return condition(decision, ConditionType.RUNNING).reason
