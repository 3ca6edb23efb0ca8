"""Each rule against the one that others maintain: ten steps from the same weights with the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from toy_parameters import HIDDEN, copies, set_gradients, toy_parameters

from pylon_api.training import LookaheadSpec, OptimizerName, OptimizerSpec
from pylon_trainer.optim.muon import is_hidden_matrix, orthogonalise
from pylon_trainer.optim.optimizer import Optimizer
from pylon_trainer.optim.sophia import BETA1, BETA2, CURVATURE_SCALE

STEPS = 10
Reference = Callable[[list[dict[str, Any]]], Any]
"""Builds the other's optimizer from parameter groups, each with its own weight decay."""


def moved(optimizer: Any, these: dict[str, Parameter], step: Callable[[int], object]) -> dict[str, torch.Tensor]:
    """How far each parameter has come in ten steps."""
    before = copies(these)
    for number in range(STEPS):
        set_gradients(these, number)
        step(number)
    return {name: parameter.detach() - before[name].detach() for name, parameter in these.items()}


def ours(spec: OptimizerSpec, only: list[str] | None = None) -> dict[str, torch.Tensor]:
    these = {name: p for name, p in toy_parameters().items() if only is None or name in only}
    optimizer = Optimizer(these, spec)
    return moved(optimizer, these, lambda number: optimizer.update(rate(number)))


def theirs(build: Reference, spec: OptimizerSpec, only: list[str] | None = None) -> dict[str, torch.Tensor]:
    these = {name: p for name, p in toy_parameters().items() if only is None or name in only}
    groups = [
        {"params": [p for p in these.values() if (p.dim() > 1) is is_matrix], "weight_decay": decay}
        for is_matrix, decay in ((True, spec.weight_decay), (False, 0.0))
    ]
    optimizer = build([group for group in groups if group["params"]])

    def step(number: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate(number)
        if spec.gradient_clip_norm:
            torch.nn.utils.clip_grad_norm_(these.values(), spec.gradient_clip_norm)
        optimizer.step()

    return moved(optimizer, these, step)


def rate(step: int) -> float:
    return 0.01 / (1 + step)


def assert_alike(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    """By the norm of each parameter's whole way."""
    assert found.keys() == wanted.keys()
    for name, way in wanted.items():
        assert float((found[name] - way).norm() / way.norm()) < tolerance, name


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_adamw_is_torchs(clip: float) -> None:
    spec = OptimizerSpec(gradient_clip_norm=clip)
    assert_alike(ours(spec), theirs(lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.95)), spec), 1e-4)


def test_adafactor_is_torchs() -> None:
    spec = OptimizerSpec(name=OptimizerName.ADAFACTOR)
    assert_alike(ours(spec), theirs(torch.optim.Adafactor, spec), 1e-4)


def test_muon_is_torchs_on_hidden_matrices_in_the_precision_of_bfloat16() -> None:
    """torch's multiplies in bfloat16, ours on a CPU in float32."""
    spec = OptimizerSpec(name=OptimizerName.MUON)
    reference = theirs(lambda groups: torch.optim.Muon(groups, adjust_lr_fn="match_rms_adamw"), spec, HIDDEN)
    assert_alike(ours(spec, HIDDEN), reference, 0.02)


def test_muon_leaves_all_but_hidden_matrices_to_adamw() -> None:
    others = [name for name in toy_parameters() if name not in HIDDEN]
    found = ours(OptimizerSpec(name=OptimizerName.MUON, gradient_clip_norm=0))
    reference = ours(OptimizerSpec(gradient_clip_norm=0))
    assert {name for name in found if torch.equal(found[name], reference[name])} == set(others)


def test_muons_steps_have_the_size_of_adamws() -> None:
    of_muon, of_adamw = (ours(OptimizerSpec(name=name, weight_decay=0)) for name in ("Muon", "AdamW"))
    for name in HIDDEN:
        assert 0.1 < float(of_muon[name].norm() / of_adamw[name].norm()) < 1


@pytest.mark.parametrize("shape", [(3, 40, 64), (2, 64, 40), (1, 32, 32)])
def test_orthogonalising_brings_singular_values_near_one_and_keeps_directions(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalise(matrices)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    kept = (left.mT @ result @ right.mT).diagonal(dim1=1, dim2=2)
    is_clear = values > 0.05 * values.amax(1, keepdim=True)  # five iterations do not lift the smallest all the way
    assert ((kept[is_clear] > 0.6) & (kept[is_clear] < 1.3)).all()
    half = orthogonalise(matrices, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), result, rtol=0, atol=0.03)


@pytest.mark.parametrize(
    ("name", "shape", "is_hidden"),
    [
        ("blocks.3.attention.query.weight", (64, 64), True),
        ("embedding_projection.weight", (128, 32), True),
        ("embedding.weight", (512, 64), False),
        ("output.weight", (512, 64), False),
        ("blocks.3.codebook.weight", (256, 64), False),
        ("blocks.3.mixer.convolution.weight", (256, 4), False),
        ("blocks.3.mixer.filters", (64, 64), False),
        ("blocks.3.mlp_norm.weight", (64,), False),
    ],
)
def test_hidden_matrices_are_told_by_name_and_shape(name: str, shape: tuple[int, ...], is_hidden: bool) -> None:
    assert is_hidden_matrix(name, torch.Size(shape)) is is_hidden


def test_lion_is_pytorch_optimizers() -> None:
    library = pytest.importorskip("pytorch_optimizer", reason="needs the package pytorch-optimizer")
    spec = OptimizerSpec(name=OptimizerName.LION)
    assert_alike(ours(spec), theirs(lambda groups: library.Lion(groups, betas=(0.9, 0.99)), spec), 1e-4)


def test_sophia_is_pytorch_optimizers_when_both_are_told_the_same_curvature() -> None:
    """Clipping at p and dividing by the curvature is clipping at 1, dividing by p x curvature, and p times the rate."""
    library = pytest.importorskip("pytorch_optimizer", reason="needs the package pytorch-optimizer")
    spec = OptimizerSpec(name=OptimizerName.SOPHIA, gradient_clip_norm=0, weight_decay=0)
    these, others = toy_parameters(), toy_parameters()
    optimizer = Optimizer(these, spec)
    reference = library.SophiaH(others.values(), betas=(BETA1, BETA2), p=CURVATURE_SCALE, eps=1e-15, update_period=1000)
    for number in range(STEPS):
        set_gradients(these, 100 + number)
        for parameter in these.values():
            assert parameter.grad is not None
            parameter.grad.mul_(0.1)
        squares = [10 * parameter.grad**2 for parameter in these.values() if parameter.grad is not None]
        optimizer.observe_drawn(tokens=10)
        for named in (these, others):
            set_gradients(named, number)
        for group in reference.param_groups:
            group["lr"] = rate(number) / CURVATURE_SCALE
        reference.step(hessian=squares)
        optimizer.update(rate(number))
    start = toy_parameters()
    ways = [{name: p.detach() - start[name].detach() for name, p in named.items()} for named in (these, others)]
    assert_alike(*ways, 1e-4)


def test_a_look_at_the_curvature_that_is_not_finite_is_left_out() -> None:
    these = toy_parameters()
    optimizer = Optimizer(these, OptimizerSpec(name=OptimizerName.SOPHIA))
    set_gradients(these, 0)
    assert these[HIDDEN[0]].grad is not None
    these[HIDDEN[0]].grad[0, 0] = float("inf")  # type: ignore[index]
    optimizer.observe_drawn(tokens=10)
    assert not any(tensor.any() for tensor in optimizer.state_dict()["curvatures"].values())


def test_lookahead_is_pytorch_optimizers() -> None:
    library = pytest.importorskip("pytorch_optimizer", reason="needs the package pytorch-optimizer")
    spec = OptimizerSpec(lookahead=LookaheadSpec(steps=3, ratio=0.4))

    def build(groups: list[dict[str, Any]]) -> Any:
        return library.Lookahead(torch.optim.AdamW(groups, betas=(0.9, 0.95)), k=3, alpha=0.4)

    assert_alike(ours(spec), theirs(build, spec), 1e-4)


def test_lookahead_meets_after_its_steps_and_not_between() -> None:
    these = toy_parameters()
    optimizer = Optimizer(these, OptimizerSpec(lookahead=LookaheadSpec(steps=2, ratio=0.5)))
    for number in range(4):
        set_gradients(these, number)
        optimizer.update(0.01)
        slow = optimizer.state_dict()["slow_weights"]
        has_met = number % 2 == 1
        for name, parameter in these.items():
            assert torch.allclose(slow[name], parameter, rtol=0, atol=1e-7) is has_met
