"""A tiny run that every test of the trainer may vary."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: test machines are small and shared

import pytest

from pylon_api.run import RunConfig

ConfigFactory = Callable[..., dict[str, Any]]


@pytest.fixture
def make_config(tmp_path: Path) -> ConfigFactory:
    """Builds a RunConfig's JSON object; `training` entries are merged over the tiny default, part by part."""
    texts = tmp_path / "text"
    texts.mkdir()
    for number in range(12):
        sentence = f"Document {number} says that a pylon carries a line, and number {number * 7} carries another. "
        (texts / f"{number:02d}.txt").write_text(sentence * 12)

    def make(attempt: int = 1, nodes: int = 1, processes: int = 2, gpus: int = 0, **training: Any) -> dict[str, Any]:
        recipe: dict[str, Any] = {
            "model": {"layers": 1, "hiddenSize": 16, "heads": 2},
            "data": {"train": [f"{texts}/*.txt"], "sequenceLength": 16, "heldOutFraction": 0.2},
            "optimizer": {"learningRate": 0.01},
            "schedule": {"steps": 8, "warmupSteps": 2},
            "batch": {"sequences": 4},
            "precision": "Float32",
            "logIntervalSteps": 1,
            "checkpoint": {"uri": str(tmp_path / "checkpoints"), "intervalSteps": 3},
            "evaluation": {"intervalSteps": 4, "sequences": 4},
        }
        for part, value in training.items():
            merged = isinstance(value, dict) and isinstance(recipe.get(part), dict)
            recipe[part] = {**recipe[part], **value} if merged else value
        config = {
            "job": "demo",
            "namespace": "default",
            "uid": "12345678-90ab",
            "attempt": attempt,
            "nodes": nodes,
            "processesPerNode": processes,
            "gpusPerNode": gpus,
            "training": {key: value for key, value in recipe.items() if value is not None},
        }
        RunConfig.model_validate(config)
        return config

    return make


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """Where make_config's runs save."""
    return tmp_path / "checkpoints" / "default" / "demo-12345678"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out what is marked `gpu` where there is none."""
    if item.get_closest_marker("gpu"):
        import torch  # most tests need it later or not at all

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture
def waiting_is_an_error() -> AbstractContextManager[None]:
    """To be entered once: in there, whatever makes the host wait for a CUDA device raises."""
    import torch  # most tests need it later or not at all

    @contextmanager
    def checked() -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return checked()
