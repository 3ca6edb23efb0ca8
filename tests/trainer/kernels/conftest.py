"""The rungs on which kernels are tested.

`device` is where a Triton kernel can run: a CUDA device, or the CPU when TRITON_INTERPRET=1 has turned kernels into
Python (test_interpreter.py starts such a run of this folder). `anywhere` adds the plain CPU, for functions that choose
their own path.
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=["cpu" if INTERPRETED else pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def anywhere(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """An interpreted run is about kernels alone: the other tests have had their turn."""
    if INTERPRETED:
        items[:] = [item for item in items if "device" in getattr(item, "fixturenames", ())]
