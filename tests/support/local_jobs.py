"""Jobs that run locally with the fake trainer, for tests of the local run and of its command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from constraints import minimal_job

FAKE_TRAINER = Path(__file__).with_name("fake_trainer.py")


def fake_job(
    directory: Path,
    *,
    nodes: int = 1,
    steps: int = 20,
    step_seconds: float = 0.01,
    commit_every: int = 0,
    deaths: list[dict[str, Any]] | None = None,
    notices: list[str] | None = None,
    **spec: Any,
) -> dict[str, Any]:
    """A manifest whose pods run the fake trainer, with its checkpoint below `directory`."""
    environment = {
        "FAKE_STATE": str(directory / "fake"),
        "FAKE_STEP_SECONDS": str(step_seconds),
        "FAKE_COMMIT_EVERY": str(commit_every),
        "FAKE_DEATHS": json.dumps(deaths or []),
        "FAKE_NOTICES": json.dumps(notices or []),
    }
    container = {
        "name": "trainer",
        "command": ["python", str(FAKE_TRAINER)],
        "env": [{"name": name, "value": value} for name, value in environment.items()],
    }
    job = minimal_job()
    job["metadata"]["name"] = "demo"
    job["spec"] |= {
        "nodes": nodes,
        "failurePolicy": {"backoffSeconds": 0, "maxRestarts": 3},
        "template": {"spec": {"containers": [container]}},
    } | spec
    job["spec"]["training"] |= {"schedule": {"steps": steps}, "checkpoint": {"uri": str(directory / "runs")}}
    return job
