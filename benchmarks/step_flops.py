"""FLOPs of the products of training steps, counted on tensors without data, in a process of their own.

Nothing is computed, so real shapes cost little; the process keeps what a step remembers of such tensors away from
steps that train. torch's FlopCounterMode also attributes FLOPs to modules, by hooks that torch.autograd.grad refuses at
leaves; its table of formulas serves without them. On a CPU's tensors attention is counted in its plain form.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pylon_api.training import DataSpec, GatingSpec, ModelSpec, Precision, ScheduleSpec, TrainingSpec
from pylon_trainer.gating import build_step
from pylon_trainer.models import build_model
from pylon_trainer.step import Batch

NO_DATA = FakeTensorMode()


@contextmanager
def counting_process() -> Iterator[Executor]:
    """Runs step_flops beside whatever the caller does meanwhile."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor


class StepFlops(NamedTuple):
    """FLOPs of eight sequences, so that every ratio gives whole ones."""

    whole: int
    """Of a step."""
    forward: int
    """Of one forward pass of all rows through blocks and head."""

    @property
    def backward(self) -> int:
        """All that a step takes beyond that forward pass."""
        return self.whole - self.forward


def step_flops(model: dict[str, Any], vocabulary: int, tokens: int, gating: dict[str, Any]) -> StepFlops:
    """Counted at few blocks, one more of which adds what each of the others would."""
    least = int(gating.get("router_layers", 1))
    first, second = (_count({**model, "layers": layers}, vocabulary, tokens, gating) for layers in (least, least + 1))
    more = int(model["layers"]) - least
    return StepFlops(*(few + (one_more - few) * more for few, one_more in zip(first, second, strict=True)))


def _count(model_fields: dict[str, Any], vocabulary: int, tokens: int, gating: dict[str, Any]) -> StepFlops:
    training = TrainingSpec(
        data=DataSpec(train=["unused"], sequence_length=tokens),
        schedule=ScheduleSpec(steps=1),
        precision=Precision.FLOAT32,
        gating=GatingSpec.model_validate(gating),
    )
    with NO_DATA, sdpa_kernel(SDPBackend.MATH):
        model = build_model(ModelSpec.model_validate(model_fields), vocab_size=vocabulary)
        tokens_BT = torch.zeros(8, tokens, dtype=torch.int64)
        step = build_step(model, training, torch.device("cpu"))
        with Counter() as whole:  # of a step at which the gate looks at no figures, which have no data here
            step.forward_backward(Batch(tokens_BT, tokens_BT), global_tokens=tokens_BT.numel(), step=1)
        with Counter() as forward, torch.no_grad():
            hidden_BTD = model(tokens_BT)
            hidden_BTD @ model.head_weight.T
    return StepFlops(whole.total, forward.total)


class Counter(TorchDispatchMode):
    """Adds up the FLOPs of all products that run inside it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=output)
        return output
