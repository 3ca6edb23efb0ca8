"""What a log interval says of time and bytes: all of the training, and nothing else."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from pylon_trainer.meter import Meter
from pylon_trainer.run import Update
from pylon_trainer.runtime.distributed import World
from pylon_trainer.step import StepResult


def update_of(tokens: int) -> Update:
    count = torch.tensor(tokens)
    result = StepResult(torch.tensor(2.0 * tokens), count, count, torch.tensor(0))
    return Update([result], torch.tensor(1.0), 0.1)


def test_time_and_bytes_are_those_of_steps_and_of_the_device_but_not_of_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now_s[-1])
    monkeypatch.setattr(dist, "all_reduce", lambda *_: None)
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    meter = Meter(world)
    for end_s, step_bytes in ((1.0, 8), (2.0, 12)):
        now_s.append(end_s)
        world.traffic.add(step_bytes, step_bytes - 1)
        meter.add(update_of(tokens=30))
    now_s.append(5.0)  # the device's lag
    with meter.paused():
        now_s.append(100.0)
        world.traffic.add(10**9, 10**9)
    now_s.append(101.0)
    world.traffic.add(100, 99)
    meter.add(update_of(tokens=30))
    reading = meter.read()
    assert (reading.step_seconds, reading.tokens_per_second) == (2.0, 15.0)
    assert (reading.loss, reading.bytes_per_step, reading.bytes_per_step_peak) == (2.0, 12, 100)
