"""The command line: what it prints for good and bad input, and that it starts fast."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from constraints import minimal_job
from local_jobs import fake_job

from pylon_operator import cli


def pylon(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, arguments)


def write(path: Path, *documents: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump_all(documents))
    return str(path)


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_help_lists_every_command_without_importing_one() -> None:
    shown = pylon("--help").output
    assert all(name in shown for name in cli.COMMANDS)
    assert pylon("--version").output.startswith("pylon")


def test_an_unknown_command() -> None:
    result = pylon("fly")
    assert result.exit_code == 2
    assert "No such command 'fly'" in result.output


def test_a_missing_dependency_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    for module in [name for name in sys.modules if name.startswith("pylon_operator.commands")]:
        monkeypatch.delitem(sys.modules, module)
    result = pylon("run", "job.yaml")
    assert result.exit_code == 1
    assert result.output == (
        "Error: `pylon run` needs rich, which is not installed: pip install 'pylon-training[operator]'\n"
    )


def test_a_plugin_is_found_and_its_missing_dependency_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = cli.EntryPoint(name="tokenizer", value="no_such_tokenizers:command", group="pylon.commands")
    monkeypatch.setattr(cli, "plugins", lambda: {"tokenizer": plugin})
    assert "tokenizer  Added by no_such_tokenizers." in pylon("--help").output
    assert "pip install 'pylon-training[trainer]'" in pylon("tokenizer").output


def test_validate_starts_without_anything_heavy() -> None:
    """In a process where importing them is an error."""
    script = f"""
        import sys
        for heavy in "torch numpy kopf kubernetes aiohttp orjson rich fsspec prometheus_client".split():
            sys.modules[heavy] = None
        from pylon_operator.cli import main
        main(["validate", {write(Path("job.yaml"), minimal_job())!r}])
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def changed(*path: str, **fields: Any) -> dict[str, Any]:
    """A job with fields set below `path`."""
    job = minimal_job()
    place = job
    for part in path:
        place = place.setdefault(part, {})
    place |= fields
    return job


@pytest.mark.parametrize(
    ("manifest", "line"),
    [
        (changed("spec", nodez=2), "spec.nodez: unknown field"),
        (changed("spec", nodes="2"), "spec.nodes: Input should be a valid integer (got '2')"),
        (changed("spec", nodes=0), "spec.nodes: Input should be greater than or equal to 1 (got 0)"),
        (
            changed("spec", "training", "schedule", tokens=5),
            "spec.training.schedule: set exactly one of steps and tokens",
        ),
        (changed("spec", "training", schedule={}), "spec.training.schedule: set exactly one of steps and tokens"),
        (changed("spec", "training", data={}), "spec.training.data.train: required, but not set"),
        (changed("metadata", name="x" * 60), "metadata.name: 'xxxxxxxxxx"),
        (changed(kind="Job"), "holds 0 documents of kind PylonJob, needs exactly 1"),
        (changed(apiVersion="v1"), "apiVersion: 'v1', should be pylon.dev/v1alpha1"),
        (changed("spec", nodes=3), "spec: training.batch.sequences 32 must be divisible by the number of processes"),
    ],
)
def test_every_command_says_what_is_wrong_with_a_manifest(manifest: dict[str, Any], line: str) -> None:
    file = write(Path("job.yaml"), manifest)
    for arguments, code in ((("validate", file), 1), (("render", file), 1), (("run", file), 78)):
        result = pylon(*arguments)
        assert result.exit_code == code, result.output
        assert f"job.yaml: {line}" in result.output
        assert "Traceback" not in result.output
    assert not Path(".pylon").exists()


@pytest.mark.parametrize(("text", "line"), [(None, "No such file"), ("a: [", "not YAML"), ("\x00", "not YAML")])
def test_a_file_that_is_no_manifest(text: str | None, line: str) -> None:
    if text is not None:
        Path("job.yaml").write_text(text)
    result = pylon("validate", "job.yaml")
    assert (result.exit_code, line in result.output) == (1, True), result.output


def test_validate_reports_all_mistakes_of_all_files() -> None:
    first = write(Path("a.yaml"), changed("spec", nodez=1, gpusPerNode=-1))
    result = pylon("validate", first, write(Path("b.yaml"), minimal_job()), "c.yaml")
    assert [line.split(": ")[:2] for line in result.output.splitlines()] == [
        ["a.yaml", "spec.gpusPerNode"],
        ["a.yaml", "spec.nodez"],
        ["b.yaml", "valid"],
        ["c.yaml", "No such file or directory"],
    ]


def test_render_prints_the_objects_of_an_attempt() -> None:
    result = pylon("render", write(Path("job.yaml"), minimal_job()), "--attempt", "3", "--image", "mine:1")
    objects = list(yaml.safe_load_all(result.output))
    assert [each["kind"] for each in objects] == ["Service", "ConfigMap", "Secret", "Job"]
    job = objects[-1]
    assert job["metadata"]["name"] == "example-a3"
    assert job["spec"]["template"]["spec"]["containers"][0]["image"] == "mine:1"


def test_render_of_a_template_that_cannot_be_merged() -> None:
    file = write(Path("job.yaml"), changed("spec", template={"spec": {"containers": "none"}}))
    result = pylon("render", file)
    assert result.exit_code == 1
    assert result.output.startswith("Error: job.yaml: spec.template")


def test_gpus_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    result = pylon("run", write(Path("job.yaml"), changed("spec", gpusPerNode=2, nodes=2)))
    assert result.exit_code == 78
    assert result.output == (
        "Error: spec.gpusPerNode: 2 x 2 GPUs asked for, 1 found on this machine; 0 trains on CPU\n"
    )
    assert not Path(".pylon").exists()


@pytest.mark.parametrize("output", ["plain", "json", "live"])
def test_run_to_the_end_and_again(tmp_path: Path, output: str) -> None:
    file = write(Path("job.yaml"), fake_job(tmp_path, notices=["a notice"]))
    result = pylon("run", file, "--output", output)
    assert result.exit_code == 0, result.output
    if output == "json":
        lines = [json.loads(line) for line in result.output.splitlines()]
        assert [*lines[0], lines[-1]["kind"]] == ["event", "PylonJob"]
        assert lines[-1]["status"]["training"]["step"] == 20
    else:
        for shown in ("default/demo succeeded.", "step 20/20", "CheckpointReady", "def fake(): pass", "a notice"):
            assert shown in result.output
    again = pylon("run", file, "--output", output)
    assert again.exit_code == 0
    fresh = pylon("run", file, "--output", output, "--fresh")
    assert fresh.exit_code == 0
    if output == "json":
        assert json.loads(again.stdout)["status"] == lines[-1]["status"]
    if output != "json":
        assert "pylon run job.yaml --fresh` starts it anew" in again.output
        assert "starts it anew" not in fresh.output


def test_the_trainers_own_line_and_code_for_a_users_mistake(tmp_path: Path) -> None:
    deaths = [{"attempt": 0, "step": 0, "code": 78, "message": "spec.training.model.heads: 3 does not divide 64"}]
    result = pylon("run", write(Path("job.yaml"), fake_job(tmp_path, deaths=deaths)))
    assert result.exit_code == 78
    assert "default/demo failed. UserError: spec.training.model.heads: 3 does not divide 64" in result.output


def test_another_recipe_needs_fresh(tmp_path: Path) -> None:
    assert pylon("run", write(Path("job.yaml"), fake_job(tmp_path, steps=5))).exit_code == 0
    file = write(Path("job.yaml"), fake_job(tmp_path, steps=6))
    result = pylon("run", file)
    assert result.exit_code == 78
    assert "spec.training.schedule.steps: was 5, now 6" in result.output
    assert pylon("run", file, "--fresh").exit_code == 0


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    Path(".pylon").write_text("in the way")
    result = pylon("run", write(Path("job.yaml"), fake_job(tmp_path)))
    assert result.exit_code == 74
    assert result.output.startswith("Error: ")
    assert "Not a directory" in result.output


def test_a_second_interrupt_stops_at_once_and_the_job_can_go_on(tmp_path: Path) -> None:
    """The fake trainer sleeps through its first step, so the commit that the first interrupt asks for never comes."""
    file = write(Path("job.yaml"), fake_job(tmp_path, step_seconds=600))
    run = subprocess.Popen(
        [sys.executable, "-m", "pylon_operator.cli", "run", file, "--output", "json"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with run:
        assert run.stdout is not None
        log = tmp_path / ".pylon/default/demo/logs/demo-a1-0.log"
        for line in run.stdout:
            status = json.loads(line).get("status", {})
            if status.get("training"):
                run.send_signal(signal.SIGINT)
            if status.get("phase") == "Suspending":
                run.send_signal(signal.SIGINT)
                break
        last = json.loads(run.stdout.read().splitlines()[-1])
    assert run.returncode == 75
    assert last["status"]["phase"] == "Suspending"
    assert "from step 0" in log.read_text()
    result = pylon("run", write(Path("job.yaml"), fake_job(tmp_path)))
    assert result.exit_code == 0, result.output
    assert "restarts    0" in result.output
