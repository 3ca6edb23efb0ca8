"""Bad configurations are refused with one line that names the field, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pylon_trainer.configuration import read_config
from pylon_trainer.errors import ConfigError

MakeConfig = Callable[..., dict[str, Any]]


def write(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(json.dumps(config))
    return path


def test_a_good_one_is_read(tmp_path: Path, make_config: MakeConfig) -> None:
    config = read_config(write(tmp_path / "run.json", make_config(nodes=2)))
    assert (config.world_size, config.training.batch.sequences) == (4, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch": {"sequences": 5}}, ["training.batch.sequences 5", "2 processes"]),
        ({"batch": {"sequences": 8, "microSequences": 3}}, ["training.batch.microSequences 3", "4 sequences"]),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused(
    tmp_path: Path, make_config: MakeConfig, change: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as refusal:
        read_config(write(tmp_path / "run.json", make_config(**change)))
    assert all(word in str(refusal.value) for word in words)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("attempt", 0, ["attempt", "greater than or equal to 1", "0"]),
        ("nodes", "many", ["nodes", "many"]),
        ("surprise", 1, ["surprise", "unknown field", "are operator and trainer image of one version of Pylon?"]),
    ],
)
def test_a_wrong_field_is_named_with_its_value(
    tmp_path: Path, make_config: MakeConfig, field: str, value: object, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as refusal:
        read_config(write(tmp_path / "run.json", {**make_config(), field: value}))
    assert all(word in str(refusal.value) for word in words)
    assert "\n" not in str(refusal.value)


def test_a_missing_file_and_no_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_config(tmp_path / "absent.json")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ConfigError, match="Invalid JSON"):
        read_config(tmp_path / "run.json")


def test_the_launcher_imports_no_torch() -> None:
    """It is what makes a bad configuration fail in a moment, and process 1 of a pod small."""
    code = "import sys, pylon_trainer.launcher; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0
