"""Multi-query associative recall (Arora et al. 2023, arXiv:2312.04927, section 4): a sequence begins with pairs of a
key and a value; later each key comes again, once, and its value must follow.

It is what attention does by looking back and a state must do from memory, so it tells architectures apart that text of
this size does not. Gaps between a pair and its query follow the paper's power law; places in between hold a filler.
Unlike the paper's, training data never repeats, and every model meets batches of all numbers of pairs in turn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gate_step import step_of
from measure import Mark
from resonate_variants import Shape, Variant
from torch import Tensor

from pylon_api.training import Compile, ScheduleSpec
from pylon_trainer.models import Decoder
from pylon_trainer.optim.optimizer import Optimizer
from pylon_trainer.optim.schedule import learning_rate_ratio
from pylon_trainer.step import IGNORED, Batch

FILLER = 0
GAP_POWER = 0.01
"""A gap of g has weight g^(GAP_POWER - 1)."""
HELD_OUT_BATCHES = 4
HELD_OUT_SEED = 10_000


@dataclass(frozen=True)
class Task:
    """How hard it is, and how long it is trained."""

    shape: Shape
    vocabulary: int
    """The first half are keys, the second half values."""
    tokens: int
    """Of a sequence."""
    pairs: tuple[int, ...]
    sequences: int
    steps: int

    def __post_init__(self) -> None:
        if 4 * max(self.pairs) > self.tokens or max(self.pairs) >= self.vocabulary // 2:
            raise ValueError(f"{max(self.pairs)} pairs do not fit {self.tokens} tokens of {self.vocabulary} kinds")


@dataclass(frozen=True)
class Result:
    """A trained model's answers."""

    parameters: int
    seconds: float
    recall: dict[int, float]
    """Share of right answers by number of pairs."""
    loss: dict[int, float]
    """Nats per answer."""


def draw(task: Task, pairs: int, generator: torch.Generator) -> Batch:
    """Sequences with labels at the second coming of each key, on the generator's device."""
    device, half = generator.device, task.vocabulary // 2
    rows, slots = task.sequences, (task.tokens - 2 * pairs) // 2
    keys_BK = torch.rand(rows, half - 1, generator=generator, device=device).argsort(-1)[:, :pairs] + 1
    values_BK = torch.randint(half, task.vocabulary, (rows, pairs), generator=generator, device=device)
    weights_S = torch.arange(1, slots + 1, device=device, dtype=torch.float32) ** (GAP_POWER - 1)
    slots_BK = torch.multinomial(weights_S.expand(rows, slots), pairs, generator=generator)
    places_BK = 2 * pairs + 2 * slots_BK
    tokens_BT = torch.full((rows, task.tokens), FILLER, device=device)
    tokens_BT[:, : 2 * pairs] = torch.stack([keys_BK, values_BK], -1).flatten(1)
    tokens_BT.scatter_(1, places_BK, keys_BK).scatter_(1, places_BK + 1, values_BK)
    labels_BT = torch.full_like(tokens_BT, IGNORED).scatter_(1, places_BK, values_BK)
    return Batch(tokens_BT, labels_BT)


def train(variant: Variant, task: Task, rate: float, seed: int, device: torch.device, compile: Compile) -> Result:
    """From fresh weights."""
    torch.manual_seed(seed)
    model = variant.build(task.shape, task.vocabulary).to(device)
    step = step_of(model, device, compile, {})
    parameters = dict(model.named_parameters())
    optimizer = Optimizer(parameters, variant.strategy.optimizer)
    schedule = ScheduleSpec(steps=task.steps, warmup_steps=task.steps // 10)
    generator = torch.Generator(device).manual_seed(seed)
    begin = Mark(device)
    for number in range(task.steps):
        pairs = task.pairs[number % len(task.pairs)]
        batch = draw(task, pairs, generator)
        step.forward_backward(batch, global_tokens=pairs * task.sequences, step=number)
        optimizer.update(rate * learning_rate_ratio(schedule, number, task.steps))
        for parameter in parameters.values():
            parameter.grad = None
    end = Mark(device)
    end.wait()
    held_out = torch.Generator(device).manual_seed(HELD_OUT_SEED)
    answers = {pairs: _examine(model, task, pairs, held_out) for pairs in task.pairs}
    return Result(
        sum(parameter.numel() for parameter in parameters.values()),
        begin.milliseconds_to(end) / 1e3,
        {pairs: recall for pairs, (recall, _) in answers.items()},
        {pairs: loss for pairs, (_, loss) in answers.items()},
    )


@torch.no_grad()
def _examine(model: Decoder, task: Task, pairs: int, generator: torch.Generator) -> tuple[float, float]:
    """Share of right answers, and nats per answer."""
    right = torch.zeros((), device=generator.device)
    loss = torch.zeros((), device=generator.device)
    for _ in range(HELD_OUT_BATCHES):
        batch = draw(task, pairs, generator)
        is_asked_BT = batch.labels_BT != IGNORED
        wanted_N: Tensor = batch.labels_BT[is_asked_BT]
        # No autocast: one pass is cheap, and an answer should not hang on rounding.
        logits_NV = model.head(model(batch.tokens_BT)[is_asked_BT]).float()
        right += (logits_NV.argmax(-1) == wanted_N).sum()
        loss += torch.nn.functional.cross_entropy(logits_NV, wanted_N, reduction="sum")
    answers = HELD_OUT_BATCHES * task.sequences * pairs
    return float(right) / answers, float(loss) / answers
