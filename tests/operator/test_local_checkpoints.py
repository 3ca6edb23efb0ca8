"""Where checkpoints of the local tier may lie in a cluster: on what the next attempt's pods find again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from local_jobs import fake_job
from operator_builders import CHECKPOINTS, a_job

from pylon_operator import cli
from pylon_operator.errors import TemplateError
from pylon_operator.local_checkpoints import refuse_lost_copies
from pylon_operator.resources import build_attempt

DISK = {"hostPath": {"path": "/mnt/nvme"}}
CLAIM = {"persistentVolumeClaim": {"claimName": "disks"}}
ROOT = Path(__file__).parents[2]


def check(directory: str, *mounts: tuple[str, dict[str, Any]], **options: Any) -> None:
    """A job that keeps copies in `directory`, with these volumes at these paths of its trainer."""
    volumes = [{"name": f"v{number}", **volume} for number, (_, volume) in enumerate(mounts)]
    mounted = [{"name": f"v{number}", "mountPath": path, **options} for number, (path, _) in enumerate(mounts)]
    containers = [{"name": "sidecar"}, {"name": "trainer", "volumeMounts": mounted}]
    template = {"spec": {"volumes": volumes, "containers": containers}}
    job = a_job(template=template, training={"checkpoint": CHECKPOINTS | {"local": {"directory": directory}}})
    refuse_lost_copies(job.spec, build_attempt(job, 1, default_image="image", token="token")[-1])


@pytest.mark.parametrize(
    ("directory", "mounts"),
    [
        ("/local", [("/local", DISK)]),
        ("/local/a/b", [("/local/", CLAIM)]),
        ("/local/a", [("/local", {"emptyDir": {}}), ("/local/a", DISK)]),
        ("/local", [("/local", {"nfs": {"server": "s", "path": "/"}})]),
    ],
)
def test_a_volume_that_outlives_the_pod_will_do(directory: str, mounts: list[tuple[str, dict[str, Any]]]) -> None:
    check(directory, *mounts)


@pytest.mark.parametrize(
    ("directory", "mounts", "said"),
    [
        ("/local", [], "no volume is mounted at /local"),
        ("/local", [("/localhost", DISK)], "no volume is mounted at /local"),
        ("/tmp/pylon/local", [], "'scratch' at /tmp/pylon (emptyDir) keeps nothing for the next attempt"),
        ("/local/a", [("/local", DISK), ("/local/a", {"emptyDir": {}})], "'v1' at /local/a (emptyDir) keeps nothing"),
        ("/local", [("/local", {"csi": {"driver": "inline"}})], "(csi) keeps nothing"),
        ("/local", [("/local", {"configMap": {"name": "c"}})], "(configMap) keeps nothing"),
    ],
)
def test_a_directory_that_would_be_lost_is_refused_by_its_field(
    directory: str, mounts: list[tuple[str, dict[str, Any]]], said: str
) -> None:
    with pytest.raises(TemplateError) as error:
        check(directory, *mounts)
    assert error.value.message.startswith("spec.training.checkpoint.local.directory: ")
    assert said in error.value.message


def test_a_read_only_mount_is_refused() -> None:
    with pytest.raises(TemplateError, match="'v0' at /local is mounted read-only"):
        check("/local", ("/local", DISK), readOnly=True)


def test_render_shows_what_the_operator_would_refuse(tmp_path: Path) -> None:
    job = fake_job(tmp_path)
    job["spec"]["training"]["checkpoint"]["local"] = {"directory": "/local"}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    shown = CliRunner().invoke(cli.main, ["render", str(tmp_path / "job.yaml")])
    assert shown.exit_code == 1
    assert "checkpoint.local.directory: no volume is mounted at /local" in shown.output


@pytest.mark.parametrize("example", sorted(ROOT.glob("examples/*.yaml")), ids=lambda path: path.stem)
def test_the_operator_would_take_every_example(example: Path) -> None:
    shown = CliRunner().invoke(cli.main, ["render", str(example)])
    assert shown.exit_code == 0, shown.output
