"""How long training runs and which learning rate each step has. Pure arithmetic.

Cosine: Loshchilov & Hutter 2017 (arXiv 1608.03983), one half period. WarmupStableDecay: Hu et al. 2024
(arXiv 2404.06395), with a linear decay.
"""

from __future__ import annotations

import math

from pylon_api.training import ScheduleKind, ScheduleSpec


def total_steps(schedule: ScheduleSpec, tokens_per_step: int) -> int:
    """Optimizer steps of the whole run; a duration in tokens is rounded up to whole steps."""
    if schedule.steps is not None:
        return schedule.steps
    assert schedule.tokens is not None
    return -(-schedule.tokens // tokens_per_step)


def learning_rate_ratio(schedule: ScheduleSpec, step: int, steps: int) -> float:
    """Learning rate of a step, as a share of the peak.

    step: number of the step from 0 (the first) to steps - 1 (the last).
    """
    warmup = min(schedule.warmup_steps, steps)
    if step < warmup:
        return (step + 1) / warmup
    floor = schedule.minimum_learning_rate_ratio
    if schedule.kind is ScheduleKind.CONSTANT:
        return 1.0
    if schedule.kind is ScheduleKind.COSINE:
        progress = (step + 1 - warmup) / (steps - warmup)
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
    decay = min(math.ceil(schedule.decay_fraction * steps), steps - warmup)
    into_decay = step + 1 - (steps - decay)
    return 1.0 if into_decay <= 0 else 1 - (1 - floor) * into_decay / decay
