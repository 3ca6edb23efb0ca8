"""Recomputed blocks: the same gradients from less that is held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pylon_api.training import DataSpec, ModelSpec, Recompute, ScheduleSpec, TrainingSpec
from pylon_trainer.gating import build_step
from pylon_trainer.models import Decoder, build_model
from pylon_trainer.models.ports import PortKind
from pylon_trainer.step import Batch

MODELS: dict[str, dict[str, Any]] = {
    "Transformer": {},
    "Resonate": {"architecture": "Resonate", "resonate": {"attentionEvery": 2, "headWidth": 16, "stateSize": 8}},
    "adapted, with a codebook that blocks share": {
        "architecture": "Resonate",
        "resonate": {"headWidth": 16, "stateSize": 8, "adaptation": {"rank": 2, "growEverySteps": 0, "codebook": {}}},
    },
}
TOKENS = torch.randint(50, (2, 33), generator=torch.Generator().manual_seed(0))
BATCH = Batch(TOKENS[:, :-1].contiguous(), TOKENS[:, 1:].contiguous())


def model_of(name: str, **fields: Any) -> Decoder:
    torch.manual_seed(0)
    spec = {"layers": 3, "hiddenSize": 32, "heads": 2} | MODELS[name] | fields
    return build_model(ModelSpec.model_validate(spec), vocab_size=50)


def gradients_of(model: Decoder, recompute: Recompute, precision: str) -> dict[str, Tensor]:
    training = TrainingSpec(
        data=DataSpec(train=["unused"]), schedule=ScheduleSpec(steps=1), precision=precision, recompute=recompute
    )
    step = build_step(model, training, torch.device("cpu"))
    step.forward_backward(BATCH, global_tokens=64, step=0)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("precision", ["Float32", "BFloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_recomputed_blocks_give_the_same_gradients(name: str, precision: str) -> None:
    kept, recomputed = (gradients_of(model_of(name), recompute, precision) for recompute in Recompute)
    assert kept.keys() == recomputed.keys()
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_advice_gets_its_gradient_through_recomputed_blocks() -> None:
    """The controller learns from it."""

    def gradient(recomputes: bool) -> Tensor:
        model = model_of("Resonate", resonate={"headWidth": 16, "stateSize": 8, "control": {"vectorSize": 8}})
        model.recomputes_blocks = recomputes
        for name, parameter in model.named_parameters():
            if "port" in name:
                torch.nn.init.ones_(parameter)
        model.advice_PR = torch.full((len(PortKind), 8), 0.1, requires_grad=True)
        return torch.autograd.grad(model(BATCH.tokens_BT).square().sum(), model.advice_PR)[0]

    gradients = [gradient(False), gradient(True)]
    assert gradients[0].norm() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_held_of_a_recomputed_block_but_its_input(name: str) -> None:
    held: dict[int, int] = {}
    for layers in (3, 6):
        model = model_of(name, layers=layers)
        model.recomputes_blocks = True
        saved: dict[int, int] = {}

        def pack(x: Tensor, saved: dict[int, int] = saved) -> Tensor:
            if not isinstance(x, torch.nn.Parameter):
                saved[x.untyped_storage().data_ptr()] = x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(BATCH.tokens_BT)
        held[layers] = sum(saved.values())
    assert held[6] - held[3] == 3 * BATCH.tokens_BT.numel() * 32
