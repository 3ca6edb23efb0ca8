"""What each codec makes of values: its error against a reference, its size, and nothing where there is nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pylon_trainer.consensus.channel import round_trip
from pylon_trainer.consensus.codecs import Codec
from pylon_trainer.consensus.codecs.dct import GROUPS, SIDE, Dct
from pylon_trainer.consensus.codecs.exact import BFLOAT16, FLOAT32
from pylon_trainer.consensus.codecs.integers import Int4, Int8
from pylon_trainer.consensus.codecs.sign import Sign
from pylon_trainer.consensus.rows import largest_rows
from pylon_trainer.consensus.sketch import HASHES, Sketch

CODECS: list[Codec] = [FLOAT32, BFLOAT16, Int8(), Int8(48), Int4(), Sign(), *map(Dct, GROUPS)]
CPU = torch.device("cpu")


def values_of(blocks: int, codec: Codec, seed: int = 0) -> Tensor:
    """Normal values whose size differs from block to block by orders of magnitude."""
    draw = torch.Generator().manual_seed(seed)
    scales_B1 = 10.0 ** torch.randint(-12, 4, (blocks, 1), generator=draw)
    return torch.randn(blocks, codec.block_values, generator=draw) * scales_B1


def error(values: Tensor, decoded: Tensor) -> float:
    return float((values - decoded).norm() / values.norm())


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: f"{codec.name} of {codec.block_values}")
@pytest.mark.parametrize("blocks", [1, 3])
def test_a_payload_has_the_size_that_was_promised(codec: Codec, blocks: int) -> None:
    payload_BP = codec.encode(values_of(blocks, codec))
    assert (payload_BP.dtype, payload_BP.shape) == (torch.uint8, (blocks, codec.block_bytes))
    assert codec.decode(payload_BP).shape == (blocks, codec.block_values)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: f"{codec.name} of {codec.block_values}")
def test_zeros_stay_zeros_beside_blocks_that_are_not(codec: Codec) -> None:
    values_BV = values_of(3, codec)
    values_BV[1] = 0
    decoded_BV = codec.decode(codec.encode(values_BV))
    assert torch.equal(decoded_BV[1], values_BV[1])
    assert torch.isfinite(decoded_BV).all()


@pytest.mark.parametrize(
    ("codec", "largest", "scales_by"),
    [(Int8(), 127, 256), (Int8(7), 127, 7), (Int4(), 7, 128)],
    ids=["Int8", "Int8 by 7", "Int4"],
)
def test_integers_are_the_nearest_multiples_of_a_block_s_scale(codec: Codec, largest: int, scales_by: int) -> None:
    values_BV = values_of(5, codec)
    scale_B1 = (values_BV.abs().amax(1, keepdim=True) / largest).bfloat16().double()
    expected_BV = (values_BV / scale_B1).round().clamp(-largest, largest) * scale_B1
    assert codec.block_values == scales_by
    torch.testing.assert_close(codec.decode(codec.encode(values_BV)).double(), expected_BV, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("codec", "at_most"), [(BFLOAT16, 0.002), (Int8(), 0.008), (Int4(), 0.13)], ids=["bfloat16", "Int8", "Int4"]
)
def test_dense_codecs_lose_little_of_normal_values(codec: Codec, at_most: float) -> None:
    values_N = torch.randn(40_001, generator=torch.Generator().manual_seed(0))
    assert error(values_N, round_trip(codec, values_N)) < at_most


def test_signs_come_with_the_mean_size_of_their_block() -> None:
    codec = Sign()
    values_BV = values_of(5, codec)
    mean_B1 = values_BV.abs().mean(1, keepdim=True).bfloat16().float()
    assert torch.equal(codec.decode(codec.encode(values_BV)), torch.copysign(mean_B1, values_BV))


@pytest.mark.parametrize("group", GROUPS)
def test_a_dct_keeps_the_largest_coefficient_of_every_group(group: int) -> None:
    """Against the definition in float64: an orthonormal DCT-II along both sides."""
    codec = Dct(group)
    values_BV = values_of(4, codec)
    angles = torch.outer(torch.arange(SIDE).double(), torch.arange(SIDE) + 0.5) * math.pi / SIDE
    basis = angles.cos() * math.sqrt(2 / SIDE)
    basis[0] /= math.sqrt(2)
    coefficients = torch.einsum("us,bst,vt->buv", basis, values_BV.double().view(-1, SIDE, SIDE), basis)
    groups = coefficients.reshape(4, group, -1)
    decoded = codec.decode(codec.encode(values_BV)).double().view(-1, SIDE, SIDE)
    kept = torch.einsum("us,bst,vt->buv", basis, decoded, basis).reshape(4, group, -1)
    largest = groups.abs().argmax(1, keepdim=True)
    is_kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, largest, True)
    scale = groups.abs().amax((1, 2), keepdim=True)
    assert (kept.abs() > 1e-4 * scale).eq(is_kept).all()
    assert (kept.sign() == groups.sign())[is_kept].all()
    assert error(groups[is_kept], kept[is_kept]) < 0.3


def test_a_dct_finds_a_wave_in_noise() -> None:
    """A pattern of one frequency is one coefficient, however many values it fills."""
    places = torch.arange(SIDE) + 0.5
    wave = torch.outer(torch.cos(math.pi / SIDE * places * 3), torch.cos(math.pi / SIDE * places * 17)).view(1, -1)
    noise = torch.randn(wave.shape, generator=torch.Generator().manual_seed(0)) * 0.05
    codec = Dct(16)
    decoded = codec.decode(codec.encode(wave + noise))
    assert torch.cosine_similarity(decoded, wave) > 0.8


@pytest.mark.parametrize(("values", "width"), [(1000, 250), (1003, 64), (64, 64), (5, 1)])
def test_a_sketch_is_linear_and_of_its_size(values: int, width: int) -> None:
    sketch = Sketch(values, width, seed=3, device=CPU)
    one, other = torch.randn(2, values, generator=torch.Generator().manual_seed(1))
    table_HW = sketch.encode(one)
    assert table_HW.shape == (HASHES, width)
    torch.testing.assert_close(table_HW + 2 * sketch.encode(other), sketch.encode(one + 2 * other))


@pytest.mark.parametrize("seed", range(3))
def test_a_sketch_finds_the_heavy_values(seed: int) -> None:
    sketch = Sketch(5000, 500, seed, CPU)
    values_N = torch.randn(5000, generator=torch.Generator().manual_seed(seed)) * 0.1
    heavy = torch.randperm(5000, generator=torch.Generator().manual_seed(seed))[:10]
    values_N[heavy] = torch.linspace(-50, 50, 10)
    found_N = sketch.round_trip(values_N)
    assert torch.allclose(found_N[heavy], values_N[heavy], atol=2)
    assert torch.count_nonzero(found_N) == 62  # an eighth of the buckets


def test_a_sketch_estimates_every_value_as_the_median_of_what_its_buckets_hold() -> None:
    """Against the definition, with each value's bucket and sign read off the sketch of that value alone."""
    sketch = Sketch(40, 8, seed=0, device=CPU)
    values_N = torch.randn(40, generator=torch.Generator().manual_seed(0))
    units_NHW = torch.stack([sketch.encode(unit) for unit in torch.eye(40)])
    assert (units_NHW.abs().sum(2) == 1).all(), "one bucket of each hash"
    table_HW = torch.einsum("n,nhw->hw", values_N, units_NHW)
    torch.testing.assert_close(sketch.encode(values_N), table_HW)
    said_NH = (units_NHW * table_HW).sum(2)
    torch.testing.assert_close(sketch.decode(table_HW), said_NH.median(1).values)


def test_largest_rows_are_kept_whole() -> None:
    values_RW = torch.tensor([[1.0, 1], [5, 0], [0, 0], [-3, 4], [2, 2]])
    expected_RW = values_RW.clone()
    expected_RW[[0, 2, 4]] = 0
    assert torch.equal(largest_rows(2, 2, values_RW.view(-1)), expected_RW.view(-1))
