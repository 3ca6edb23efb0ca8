"""Whole runs of two ranks that exchange few bytes: where they end, what they say, how they go on."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gangs import Pod, run_pod

from pylon_api.names import ExitCode

MakeConfig = Callable[..., dict[str, Any]]
STEPS = 60


def final_of(directory: Path, make_config: MakeConfig, **consensus: Any) -> Any:
    fields = {"schedule": {"steps": STEPS}, "checkpoint": None, "consensus": consensus, "logIntervalSteps": STEPS // 2}
    exit_code, pod = run_pod(directory, make_config(**fields))
    assert exit_code == 0, pod.log
    return pod.final


@pytest.mark.parametrize(
    ("consensus", "tolerance", "fewer_bytes"),
    [
        ({"codec": "Int8"}, 0.03, 3.7),
        ({"codec": "Int4"}, 0.04, 7),
        ({"codec": "Dct"}, 0.1, 25),
        ({"codec": "Auto", "bytesPerStep": 8000}, 0.1, 8),
        ({"codec": "Int4", "localSteps": 8}, 0.1, 40),
    ],
    ids=lambda value: value["codec"] + " local" * ("localSteps" in value) if isinstance(value, dict) else "",
)
def test_a_run_ends_about_as_low_as_the_exact_one(
    tmp_path: Path, make_config: MakeConfig, consensus: dict[str, Any], tolerance: float, fewer_bytes: float
) -> None:
    exact = final_of(tmp_path / "exact", make_config)
    final = final_of(tmp_path / "compressed", make_config, **consensus)
    assert final.loss < exact.loss * (1 + tolerance)  # steps at this rate are rough: a little noise may also help
    assert exact.bytes_per_step / final.bytes_per_step > fewer_bytes
    assert final.bytes_per_step <= final.bytes_per_step_peak <= consensus.get("bytesPerStep", 2_000_000)
    assert (final.healed_replicas, final.skipped_steps) == (0, 0)


def test_a_budget_that_is_too_small_is_refused_at_the_start(tmp_path: Path, make_config: MakeConfig) -> None:
    exit_code, pod = run_pod(tmp_path, make_config(consensus={"codec": "Auto", "bytesPerStep": 4200}))
    assert exit_code == ExitCode.BAD_CONFIG
    assert "training.consensus.bytesPerStep 4200 is too small: the least possible is " in pod.report.message
    assert "Traceback" not in pod.log


def test_the_least_budget_that_a_refusal_names_is_kept_in_turns_of_control_too(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    """A turn sends some 16 KB, as much as four times what is set aside for all that ranks say beside gradients."""
    own = {"headWidth": 8, "stateSize": 8, "attentionEvery": 0, "control": {"outerEverySteps": 8, "vectorSize": 4096}}

    def run_within(budget_bytes: int) -> tuple[int, Pod]:
        fields = {"model": {"architecture": "Resonate", "resonate": own}, "schedule": {"steps": 10}, "checkpoint": None}
        consensus = {"codec": "Int8", "bytesPerStep": budget_bytes}
        return run_pod(tmp_path / str(budget_bytes), make_config(**fields, consensus=consensus))

    exit_code, refused = run_within(1)
    assert exit_code == ExitCode.BAD_CONFIG
    named = re.search(r"the least possible is (\d+) bytes", refused.report.message)
    assert named, refused.report.message
    least_bytes = int(named[1])
    exit_code, pod = run_within(least_bytes)
    assert exit_code == 0, pod.log
    assert pod.final.bytes_per_step < pod.final.bytes_per_step_peak <= least_bytes
