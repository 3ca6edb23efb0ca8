"""BiNLOP: its lines, their order whatever the parameters are, its inverse, its determinant, and int8."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pylon_api.training import ModelSpec, OptimizerSpec
from pylon_trainer.models import build_model
from pylon_trainer.models.resonate.binlop import Binlop
from pylon_trainer.models.resonate.binlop_int8 import Int8Binlop
from pylon_trainer.optim.optimizer import Optimizer

WILD = [-1e30, -1e4, -40.0, -3.0, 0.0, 3.0, 40.0, 1e4, 1e30]


def binlop_of(*raw: float, minimum_slope: float = 0.5, dtype: torch.dtype = torch.float32) -> Binlop:
    """raw: of two knees and two slopes; none: the first ones."""
    activation = Binlop(minimum_slope).to(dtype)
    if raw:
        activation.raw_knees.data = torch.tensor(raw[:2], dtype=dtype)
        activation.raw_slopes.data = torch.tensor(raw[2:], dtype=dtype)
    return activation


def points(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """On every line."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype) * 2


def test_values_on_every_line_and_at_knees() -> None:
    activation = binlop_of(dtype=torch.float64)
    k1, k2, g1, g2 = activation.coefficients().tolist()
    assert (k1, k2, g1, g2) == pytest.approx((0.5, 1.5, 0.75, 0.625))
    x = torch.tensor([0.0, 0.3, k1, 1.0, k2, 4.0], dtype=torch.float64)
    expected = torch.tensor([0.0, 0.3, k1, k1 + g1 * 0.5, k1 + g1, k1 + g1 + g2 * 2.5], dtype=torch.float64)
    torch.testing.assert_close(activation.bend(x), expected)
    torch.testing.assert_close(activation.bend(-x), -expected)


@pytest.mark.parametrize("minimum_slope", [0.05, 0.5, 0.9])
def test_no_parameters_break_the_order(minimum_slope: float) -> None:
    activation = Binlop(minimum_slope)
    pairs = torch.cartesian_prod(torch.tensor(WILD), torch.tensor(WILD)).T
    activation.raw_slopes.data = pairs
    activation.raw_knees.data = pairs.clamp_max(1e18)  # the square of 1e30 is beyond float32
    k1, k2, g1, g2 = activation.coefficients()
    assert ((k1 > 0) & (k1 < k2) & k2.isfinite()).all()
    assert ((g1 <= 1) & (g1 >= g2) & (g2 >= torch.tensor(minimum_slope))).all()


def test_gradients_reach_inputs_and_parameters_in_every_region() -> None:
    activation = binlop_of(0.1, 0.2, 0.3, -0.4, dtype=torch.float64)
    gate, up = points(40).requires_grad_(), points(40).flip(0).requires_grad_()

    def product(gate: Tensor, up: Tensor, knees: Tensor, slopes: Tensor) -> Tensor:
        raw = {"raw_knees": knees, "raw_slopes": slopes}
        y: Tensor = torch.func.functional_call(activation, raw, (gate, up))
        return y

    assert torch.autograd.gradcheck(product, (gate, up, activation.raw_knees, activation.raw_slopes))


@pytest.mark.parametrize("raw", [(), (2.0, -3.0, -4.0, -4.0), (-40.0, 1.0, 40.0, -40.0)])
def test_the_inverse_brings_back_what_went_in(raw: tuple[float, ...]) -> None:
    activation, x = binlop_of(*raw, dtype=torch.float64), points(500)
    torch.testing.assert_close(activation.inverse(activation.bend(x)), x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(activation.bend(activation.inverse(x)), x, rtol=1e-12, atol=1e-12)


def test_the_inverse_in_bfloat16_is_as_near_as_its_digits() -> None:
    activation, x = binlop_of(), points(500, dtype=torch.bfloat16)
    error = (activation.inverse(activation.bend(x)) - x).abs().float()
    assert (error <= x.abs().float() * 2**-7).all()


def test_the_determinant_is_that_of_the_jacobian() -> None:
    activation, x = binlop_of(dtype=torch.float64), points(3, 7)
    jacobians = torch.stack([torch.autograd.functional.jacobian(activation.bend, row) for row in x])
    torch.testing.assert_close(activation.log_determinant(x), jacobians.slogdet().logabsdet)
    inverses = activation.log_determinant(activation.inverse(activation.bend(x)))
    torch.testing.assert_close(inverses, activation.log_determinant(x))


ALL_INT8 = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8)


@pytest.mark.parametrize("raw", [(), (3.0, 1.0, -1.0, -2.0), (-40.0, -40.0, 40.0, -40.0)])
@pytest.mark.parametrize(
    ("input_scale", "output_scale"),
    [(0.02, 0.02), (0.05, 0.03), (0.013, 0.021), (1e-3, 1.0), (4.0, 1e-2), (3e-9, 1e-9)],
)
def test_int8_is_within_its_error_bound(raw: tuple[float, ...], input_scale: float, output_scale: float) -> None:
    activation = binlop_of(*raw, dtype=torch.float64)
    integers = Int8Binlop.of(activation.coefficients(), input_scale, output_scale)
    real = activation.bend(ALL_INT8.double() * input_scale) / output_scale
    error = (integers(ALL_INT8) - real.clamp(-127, 127)).abs().max()
    assert error <= integers.error_bound()
    if input_scale < 2 * output_scale:
        assert integers.error_bound() < 0.51


def test_int8_is_the_same_arithmetic_in_pure_integers() -> None:
    """Python's integers have any size: nothing overflows 32 bits, and nothing depends on a float."""
    activation = binlop_of()
    for scales in [(0.02, 0.03), (100.0, 0.01), (1e-6, 1.0)]:
        integers = Int8Binlop.of(activation.coefficients(), *scales)
        for q, actual in zip(ALL_INT8.tolist(), integers(ALL_INT8).tolist(), strict=True):
            line = sum(abs(q) > knee for knee in integers.knees)
            wide = integers.multipliers[line] * abs(q) + integers.offsets[line] + (1 << integers.shift) // 2
            assert wide < 2**31
            assert actual == min(wide >> integers.shift, 127) * (-1 if q < 0 else 1)


@pytest.mark.parametrize("scales", [(0.0, 1.0), (1.0, -1.0), (1.0, 1e-5), (math.nan, 1.0), (math.inf, 1.0)])
def test_scales_that_int8_cannot_serve_are_refused(scales: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="BiNLOP in int8: from scale"):
        Int8Binlop.of(binlop_of().coefficients(), *scales)


def model_of(activation: str, **own: object) -> torch.nn.Module:
    torch.manual_seed(0)
    spec = {
        "architecture": "Resonate",
        "layers": 2,
        "hiddenSize": 32,
        "heads": 2,
        "initializerStd": 0.2,
        "resonate": {"stateSize": 8, "headWidth": 16, "chunkTokens": 4, "attentionEvery": 2, "activation": activation}
        | own,
    }
    return build_model(ModelSpec.model_validate(spec), vocab_size=37)


RAW = {f"blocks.{block}.mlp.activation.raw_{kind}" for block in (0, 1) for kind in ("knees", "slopes")}


def test_activations_differ_in_nothing_but_what_binlop_learns() -> None:
    states = {name: model_of(name).state_dict() for name in ("Silu", "Gelu", "Relu", "Binlop")}
    for name, state in states.items():
        assert set(state) - set(states["Silu"]) == (RAW if name == "Binlop" else set())
        assert all(torch.equal(state[key], tensor) for key, tensor in states["Silu"].items())
    tokens_BT = torch.arange(10)[None]
    outputs = [model_of(name)(tokens_BT) for name in states]
    assert all(not torch.allclose(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


def test_a_saved_model_computes_the_same() -> None:
    model, tokens_BT = model_of("Binlop"), torch.arange(10)[None]
    for name, parameter in model.named_parameters():
        if name in RAW:
            parameter.data += 0.7
    other = model_of("Binlop")
    assert not torch.equal(other(tokens_BT), model(tokens_BT))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens_BT), model(tokens_BT))


def test_weights_decay_and_knees_do_not() -> None:
    model = model_of("Binlop")
    parameters = dict(model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    Optimizer(parameters, OptimizerSpec()).update(0.1)
    assert not torch.equal(parameters["blocks.0.mlp.gate.weight"], before["blocks.0.mlp.gate.weight"])
    assert all(torch.equal(parameters[name], before[name]) for name in RAW)
