"""Labels that a model draws itself, and what Sophia is told of them."""

from __future__ import annotations

import pytest
import torch

from pylon_api.training import Compile, DataSpec, ModelSpec, OptimizerSpec, ScheduleSpec, TrainingSpec
from pylon_trainer.gating import build_plain_step
from pylon_trainer.models import Resonate, build_model
from pylon_trainer.optim.curvature import build_curvature
from pylon_trainer.optim.optimizer import Optimizer
from pylon_trainer.runtime.distributed import World
from pylon_trainer.step import IGNORED, Batch

CPU = torch.device("cpu")
VOCABULARY = 5


MODEL = ModelSpec(layers=1, hidden_size=16, heads=2, initializer_std=0.2)


def recipe(optimizer: dict[str, object], model: ModelSpec = MODEL) -> TrainingSpec:
    return TrainingSpec(
        model=model,
        data=DataSpec(train=["unused"]),
        schedule=ScheduleSpec(steps=1),
        precision="Float32",
        compile=Compile.OFF,
        optimizer=OptimizerSpec.model_validate(optimizer),
    )


def batch_of(tokens_BT: torch.Tensor) -> Batch:
    return Batch(tokens_BT, torch.zeros_like(tokens_BT))


def test_labels_are_drawn_from_the_models_own_distribution_where_there_are_any() -> None:
    torch.manual_seed(0)
    model = build_model(recipe({}).model, vocab_size=VOCABULARY)
    batch = batch_of(torch.tensor([[1, 2]]).expand(4000, 2).contiguous())
    batch.labels_BT[:, 0] = IGNORED
    drawn = build_plain_step(model, recipe({}), CPU).draw_labels(batch).labels_BT
    assert (drawn[:, 0] == IGNORED).all()
    with torch.no_grad():
        expected = model.head(model(batch.tokens_BT[:1]))[0, 1].softmax(-1)
    found = torch.bincount(drawn[:, 1], minlength=VOCABULARY) / len(drawn)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03)
    assert 0.1 < float(expected.max()) < 0.95, "there is something to draw"


def test_sophia_is_told_the_curvature_at_its_intervals_and_finds_no_gradients_of_it() -> None:
    training = recipe({"name": "Sophia", "curvatureSteps": 2})
    model = build_model(training.model, vocab_size=VOCABULARY)
    parameters = dict(model.named_parameters())
    optimizer = Optimizer(parameters, training.optimizer)
    curvature = build_curvature(World(0, 1, 0, CPU), training, model, optimizer, parameters)
    assert curvature is not None
    batch = batch_of(torch.randint(VOCABULARY, (2, 8)))
    for step, is_told in ((1, False), (2, True)):
        curvature.follow([batch], 16, step)
        curvatures = optimizer.state_dict()["curvatures"].values()
        assert all(bool(values.any()) is is_told for values in curvatures)
        assert all(parameter.grad is None for parameter in parameters.values())


def test_a_token_counts_once_as_use_of_the_codebook_though_labels_are_drawn_for_it() -> None:
    own = {
        "headWidth": 8,
        "stateSize": 8,
        "attentionEvery": 0,
        "adaptation": {"rank": 2, "maximumRank": 4, "codebook": {"subKeys": 8, "width": 8}},
    }
    spec = ModelSpec.model_validate({"architecture": "Resonate", "layers": 1, "hiddenSize": 16, "resonate": own})
    training = recipe({"name": "Sophia", "curvatureSteps": 1}, spec)
    model = build_model(spec, vocab_size=VOCABULARY)
    assert isinstance(model, Resonate)
    assert model.codebook is not None
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = Optimizer(parameters, training.optimizer)
    curvature = build_curvature(World(0, 1, 0, CPU), training, model, optimizer, parameters)
    assert curvature is not None
    batch = batch_of(torch.randint(VOCABULARY, (2, 8)))
    build_plain_step(model, training, CPU).forward_backward(batch, global_tokens=16, step=0)
    counts = model.codebook.counts.clone()
    assert counts.any()
    curvature.follow([batch], 16, 1)
    assert torch.equal(model.codebook.counts, counts)


@pytest.mark.parametrize("name", ["AdamW", "Muon", "Lion", "Adafactor"])
def test_no_other_optimizer_wants_to_know(name: str) -> None:
    training = recipe({"name": name})
    model = build_model(training.model, vocab_size=VOCABULARY)
    parameters = dict(model.named_parameters())
    optimizer = Optimizer(parameters, training.optimizer)
    assert build_curvature(World(0, 1, 0, CPU), training, model, optimizer, parameters) is None
