"""The Mamba-2 mixer computes what transformers' does, with the same weights."""

from __future__ import annotations

import pytest
import torch
from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

from pylon_api.training import ModelSpec
from pylon_trainer.export import SCAN
from pylon_trainer.models.context import Context
from pylon_trainer.models.resonate.mamba import Mamba

NAMES = {
    ours.removeprefix("mixer."): theirs.removeprefix("mamba.")
    for theirs, (ours,) in SCAN.items()
    if ours.startswith("mixer.")
}
"""Our name of each parameter, and theirs."""

PLAIN = Context(*(torch.zeros(0),) * 3, starts_BT=None, mask=None)


def mamba_of(**fields: object) -> Mamba:
    torch.manual_seed(0)
    own = {"stateSize": 16, "headWidth": 16, "chunkTokens": 8} | fields
    return Mamba(ModelSpec.model_validate({"architecture": "Resonate", "hiddenSize": 64, "heads": 2, "resonate": own}))


def their_mixer(mixer: Mamba) -> Mamba2Mixer:
    own = mixer.own
    config = Mamba2Config(
        num_heads=len(mixer.skip),
        head_dim=own.head_width,
        hidden_size=64,
        state_size=own.state_size,
        expand=own.expand,
        conv_kernel=own.conv_width,
        n_groups=own.groups,
        chunk_size=own.chunk_tokens,
        use_bias=False,
        num_hidden_layers=1,
        layer_norm_epsilon=mixer.epsilon,
    )
    theirs = Mamba2Mixer(config, 0)
    with torch.no_grad():
        for ours, name in NAMES.items():
            parameter = theirs.get_parameter(name)
            parameter.copy_(mixer.get_parameter(ours).view_as(parameter))
    return theirs


@pytest.mark.parametrize("fields", [{}, {"groups": 2, "convWidth": 2}, {"expand": 1, "headWidth": 32, "stateSize": 8}])
@pytest.mark.parametrize("length", [1, 37])
def test_equals_transformers_with_gradients(fields: dict[str, object], length: int) -> None:
    mixer = mamba_of(**fields)
    theirs = their_mixer(mixer)
    assert {name for name, _ in mixer.named_parameters()} == NAMES.keys()
    x_BTD = torch.randn(3, length, 64)

    y_BTD, expected = mixer(x_BTD, PLAIN), theirs(x_BTD)
    torch.testing.assert_close(y_BTD, expected, rtol=1e-5, atol=1e-5)

    weights = torch.randn(y_BTD.shape)
    (y_BTD * weights).sum().backward()
    (expected * weights).sum().backward()
    for ours, name in NAMES.items():
        gradient, reference = mixer.get_parameter(ours).grad, theirs.get_parameter(name).grad
        assert gradient is not None
        assert reference is not None
        assert (gradient - reference.view_as(gradient)).norm() <= 1e-4 * reference.norm(), ours


def test_only_the_projections_outputs_are_held_for_the_way_back() -> None:
    """Not the chunks' scores and states, nor anything else between: what is held does not depend on the chunk."""
    held = []
    for chunk_tokens in (4, 32):
        mixer = mamba_of(chunkTokens=chunk_tokens)
        saved: list[int] = []
        x_BTD = torch.randn(2, 64, 64, requires_grad=True)

        def pack(x: torch.Tensor, saved: list[int] = saved) -> torch.Tensor:
            saved.append(0 if isinstance(x, torch.nn.Parameter) else x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            mixer(x_BTD, PLAIN)
        held.append(sum(saved))
    projected, inner = sum(mixer.sizes), 128
    assert held[0] == held[1]
    assert held[0] <= 2 * 64 * (64 + projected + inner) + mixer.output.weight.numel() + mixer.input.weight.numel()


def test_poles_start_negative_and_steps_as_published() -> None:
    mixer = mamba_of(headWidth=1)
    poles, steps = -mixer.log_poles.exp(), torch.nn.functional.softplus(mixer.step_bias)
    assert -16 <= poles.min() <= poles.max() <= -1
    assert 0.0009 < steps.min() < steps.max() < 0.11
