"""Our AdamW against torch's, and what it does with gradients that are not finite."""

from __future__ import annotations

import pytest
import torch

from pylon_api.training import OptimizerSpec
from pylon_trainer.checkpoint.state import separate
from pylon_trainer.optim.adamw import AdamW

SPEC = OptimizerSpec(learning_rate=0.01, gradient_clip_norm=0)


def parameters(seed: int = 0) -> dict[str, torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"matrix": (3, 4), "vector": (4,), "other": (2, 2)}
    return {name: torch.nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in shapes.items()}


def set_gradients(parameters: dict[str, torch.nn.Parameter], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=draw)


def values(parameters: dict[str, torch.nn.Parameter]) -> dict[str, list[float]]:
    return {name: parameter.detach().flatten().tolist() for name, parameter in parameters.items()}


def test_updates_follow_the_published_algorithm_with_vectors_not_decayed() -> None:
    """Algorithm 2 of Loshchilov & Hutter 2019, in float64."""
    these = parameters()
    expected = {name: parameter.detach().double() for name, parameter in these.items()}
    first = {name: torch.zeros_like(value) for name, value in expected.items()}
    second = {name: torch.zeros_like(value) for name, value in expected.items()}
    optimizer = AdamW(these, SPEC)
    for step in range(1, 6):
        learning_rate = 0.01 / step
        set_gradients(these, step)
        for name, value in expected.items():
            gradient = these[name].grad
            assert gradient is not None
            first[name] = SPEC.beta1 * first[name] + (1 - SPEC.beta1) * gradient
            second[name] = SPEC.beta2 * second[name] + (1 - SPEC.beta2) * gradient**2
            mean, variance = first[name] / (1 - SPEC.beta1**step), second[name] / (1 - SPEC.beta2**step)
            decay = SPEC.weight_decay if value.dim() > 1 else 0.0
            expected[name] = value - learning_rate * (mean / (variance.sqrt() + SPEC.epsilon) + decay * value)
        optimizer.update(learning_rate)
    for name, value in expected.items():
        torch.testing.assert_close(these[name].detach().double(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("clip", "scale"), [(0.0, 1.0), (1e9, 1.0), (0.5, None)])
def test_the_norm_is_returned_unclipped_and_gradients_are_scaled_to_the_limit(clip: float, scale: float | None) -> None:
    these = parameters()
    set_gradients(these, 1)
    before = {name: parameter.grad.clone() for name, parameter in these.items() if parameter.grad is not None}
    norm = float(torch.cat([gradient.flatten() for gradient in before.values()]).norm())
    returned = AdamW(these, OptimizerSpec(gradient_clip_norm=clip)).update(0.01)
    assert float(returned) == pytest.approx(norm)
    for name, gradient in before.items():
        torch.testing.assert_close(these[name].grad, gradient * (scale or clip / norm), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_changes_nothing_and_is_counted(bad: float) -> None:
    these, untouched = parameters(), parameters()
    optimizer, reference = AdamW(these, SPEC), AdamW(untouched, SPEC)
    for step in range(4):
        set_gradients(these, step)
        if step in (1, 2):
            assert these["other"].grad is not None
            these["other"].grad[0, 0] = bad
        else:
            set_gradients(untouched, step)
            reference.update(0.01)
        optimizer.update(0.01)
        assert int(optimizer.skipped_in_row) == (0, 1, 2, 0)[step]
    assert int(optimizer.skipped) == 2
    assert values(these) == values(untouched)


def test_restored_state_goes_on_bit_for_bit() -> None:
    these = parameters()
    optimizer = AdamW(these, SPEC)
    set_gradients(these, 0)
    optimizer.update(0.01)
    copies = {name: torch.nn.Parameter(parameter.detach().clone()) for name, parameter in these.items()}
    restored = AdamW(copies, SPEC)
    saved, state = separate(optimizer.state_dict())[1], separate(restored.state_dict())[1]
    assert saved.keys() == state.keys()
    for key, tensor in state.items():
        tensor.copy_(saved[key])
    for named, one in ((these, optimizer), (copies, restored)):
        set_gradients(named, 1)
        one.update(0.01)
    assert values(these) == values(copies)
