"""What every optimizer keeps to: clipping, steps left out, state by name, gradients that are smoothed already."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch
from toy_parameters import HIDDEN, SHAPES, bits, copies, set_gradients, toy_parameters

from pylon_api.training import OptimizerName, OptimizerSpec
from pylon_trainer.checkpoint.state import separate
from pylon_trainer.optim.optimizer import Optimizer

SPECS = [OptimizerSpec(name=name) for name in OptimizerName] + [
    OptimizerSpec.model_validate({"name": name, "lookahead": {"steps": 2, "ratio": 0.3}}) for name in OptimizerName
]
all_optimizers = pytest.mark.parametrize(
    "spec", SPECS, ids=lambda spec: spec.name + (" with lookahead" if spec.lookahead else "")
)


@all_optimizers
def test_the_norm_is_returned_unclipped(spec: OptimizerSpec) -> None:
    these = toy_parameters()
    set_gradients(these, 1)
    gradients = [parameter.grad.flatten() for parameter in these.values() if parameter.grad is not None]
    norm = float(torch.cat(gradients).norm())
    assert float(Optimizer(these, spec).update(0.01)) == pytest.approx(norm)


@all_optimizers
def test_clipping_is_a_division_of_all_gradients_by_one_number(spec: OptimizerSpec) -> None:
    clipped, divided = toy_parameters(), toy_parameters()
    ours = Optimizer(clipped, spec.model_copy(update={"gradient_clip_norm": 0.5}))
    reference = Optimizer(divided, spec.model_copy(update={"gradient_clip_norm": 0.0}))
    for step in range(4):
        set_gradients(clipped, step)
        set_gradients(divided, step)
        torch.nn.utils.clip_grad_norm_(divided.values(), 0.5)
        ours.update(0.01)
        reference.update(0.01)
    for name, parameter in divided.items():
        torch.testing.assert_close(clipped[name], parameter, rtol=1e-5, atol=1e-6)


@all_optimizers
def test_gradients_below_the_limit_are_as_if_there_were_none(spec: OptimizerSpec) -> None:
    limited, free = toy_parameters(), toy_parameters()
    for these, limit in ((limited, 1e9), (free, 0.0)):
        set_gradients(these, 1)
        Optimizer(these, spec.model_copy(update={"gradient_clip_norm": limit})).update(0.01)
    assert bits(limited) == bits(free)


@all_optimizers
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("steps", [(0, 1), (1, 2)], ids=["from the start", "in the middle"])
def test_a_bad_gradient_changes_nothing_and_is_counted(spec: OptimizerSpec, bad: float, steps: tuple[int, int]) -> None:
    these, untouched = toy_parameters(), toy_parameters()
    optimizer, reference = Optimizer(these, spec), Optimizer(untouched, spec)
    for step in range(4):
        set_gradients(these, step)
        if step in steps:
            gradient = these[HIDDEN[0]].grad
            assert gradient is not None
            gradient[0, 0] = bad
        else:
            set_gradients(untouched, step)
            reference.update(0.01)
        optimizer.update(0.01)
        assert int(optimizer.skipped_in_row) == (1 + steps.index(step) if step in steps else 0)
    assert int(optimizer.skipped) == 2
    assert bits(these) == bits(untouched)
    for name, tensor in optimizer.tensors.items():
        assert torch.equal(tensor, reference.tensors[name]), name


@all_optimizers
def test_restored_state_goes_on_bit_for_bit(spec: OptimizerSpec) -> None:
    these = toy_parameters()
    optimizer = Optimizer(these, spec)
    for seed in range(3):
        set_gradients(these, seed)
        optimizer.update(0.01)
    others = copies(these)
    restored = Optimizer(others, spec)
    saved, state = separate(optimizer.state_dict())[1], separate(restored.state_dict())[1]
    assert saved.keys() == state.keys()
    for key, tensor in state.items():
        tensor.copy_(saved[key])
    for named, one in ((these, optimizer), (others, restored)):
        set_gradients(named, 4)
        one.update(0.01)
    assert bits(these) == bits(others)
    assert all(torch.equal(tensor, restored.tensors[name]) for name, tensor in optimizer.tensors.items())


@all_optimizers
def test_all_that_is_saved_is_compared_between_replicas(spec: OptimizerSpec) -> None:
    optimizer = Optimizer(toy_parameters(), spec)
    saved = {tensor.data_ptr() for tensor in separate(optimizer.state_dict())[1].values()}
    assert saved == {tensor.data_ptr() for tensor in optimizer.tensors.values()}


@pytest.mark.parametrize("name", [name for name in OptimizerName if name is not OptimizerName.ADAFACTOR])
def test_a_gradient_with_a_momentum_gets_no_other(name: OptimizerName) -> None:
    """With a first moment, the direction of the last step would show in this one."""
    smoothed, fresh = toy_parameters(), toy_parameters()
    optimizer = Optimizer(smoothed, OptimizerSpec(name=name, weight_decay=0, beta2=0.0 if name != "Lion" else None))
    set_gradients(smoothed, 1)
    optimizer.update(0.0, smoothed=SHAPES)
    first = Optimizer(fresh, OptimizerSpec(name=name, weight_decay=0, beta2=0.0 if name != "Lion" else None))
    for these, one in ((smoothed, optimizer), (fresh, first)):
        set_gradients(these, 2)
        one.update(0.01, smoothed=SHAPES)
    for key, parameter in fresh.items():
        torch.testing.assert_close(smoothed[key], parameter)


@all_optimizers
def test_vectors_are_not_decayed(spec: OptimizerSpec) -> None:
    these = toy_parameters()
    before = copies(these)
    Optimizer(these, spec.model_copy(update={"lookahead": None})).update(0.01)  # gradients are zero
    for name, parameter in these.items():
        kept = 1 - 0.01 * spec.weight_decay if len(SHAPES[name]) > 1 else 1.0
        torch.testing.assert_close(parameter, kept * before[name])


@all_optimizers
@pytest.mark.gpu
def test_on_a_gpu_no_update_waits_and_it_goes_where_a_cpu_does(
    spec: OptimizerSpec, waiting_is_an_error: AbstractContextManager[None]
) -> None:
    here = toy_parameters()
    there = {name: torch.nn.Parameter(parameter.detach().to("cuda")) for name, parameter in here.items()}
    with waiting_is_an_error:
        optimizers = [Optimizer(here, spec), Optimizer(there, spec)]
        for step in range(4):
            set_gradients(here, step)
            for name, parameter in here.items():
                assert parameter.grad is not None
                there[name].grad = parameter.grad.to("cuda", non_blocking=True)
            for optimizer in optimizers:
                optimizer.update(0.01)
    start = toy_parameters()
    for name, parameter in here.items():
        way = parameter.detach() - start[name].detach()
        error = there[name].detach().cpu() - parameter.detach()
        # Updates of one size may lead back to the start, to the bit: then here and there.
        assert error.norm() <= (0.05 if spec.name == OptimizerName.MUON else 1e-3) * way.norm(), name
