"""Everything random comes from `training.seed`, so that one seed on the same machines gives the same losses."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch


def make_deterministic() -> None:
    """Choose deterministic kernels; an operation that has none raises RuntimeError.

    Warning instead would not do: attention's backward pass on CUDA then stays as it is.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # The same as use_deterministic_algorithms, which also imports the whole of Inductor: seconds that few runs need.
    torch.set_deterministic_debug_mode("error")
    # Filling every new tensor finds reads of uninitialised memory, which is a test's business, and costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed this process's generators. Ranks that must draw alike pass the same rank."""
    torch.manual_seed((seed << 20) + rank)


def reseed(seed: int, rank: int, step: int) -> None:
    """Seed the generators of a process that goes on at a step in another's place: the same way every time, and as no
    other rank or step."""
    (state,) = np.random.SeedSequence([seed, rank, step]).generate_state(1, np.uint64)
    torch.manual_seed(int(state))


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of this process's generators, as CPU tensors."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def load_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what rng_state gave; a generator that was not saved keeps its seed."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
