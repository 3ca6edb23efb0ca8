"""The gated norm, each way in one pass over memory.

A program takes a group's channels of a part of the tokens, a few rows at a time, all their channels in registers, and
has the next rows on their way from memory meanwhile. A row is cut into tiles whose width is a power of 2: one tile for
all 1536 channels of a group would keep a quarter of the threads idle. Tiles are added up number by number before
threads exchange sums, so that a row costs one exchange forward and two backward.

Backward, with a the gated numbers, s their inverse root mean square, n = a s the normed ones and d_n their gradient,
the weight's share included: d_a = s (d_n - n mean(d_n n)). What weights and skips receive is summed channel by channel
per program, and a second, small sum joins the programs. The order of every sum depends on the shapes alone: the same
input gives the same bits.

Shapes: N tokens of all sequences, O channels in H heads of P and in G groups of W, Q parts of TOKENS tokens, R rows and
C channels of a tile, X = 2 for skips and weights.
"""

# mypy: disable-error-code="assignment"
# Tuples that grow by a tile at a time change their type.

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pylon_trainer.kernels.rows import row_unit, side_by_side

NARROWEST = 128
"""Channels of a tile, if a group has as many: fewer side by side are slow to load."""
MOST_WARPS = 32


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a kernel is cut up."""

    tokens: int
    """Of a part."""
    tiles: int
    """At most, that a row is cut into."""
    vector: int
    """Numbers of a tile that a thread has, a power of 2."""
    warps: int
    """Of a program; more where a row is wider than they are at once."""
    stages: int
    """Steps that are on their way from memory while another is worked on, and that one."""


FORWARD = Tiling(tokens=32, tiles=4, vector=4, warps=4, stages=2)
BACKWARD = Tiling(tokens=64, tiles=4, vector=4, warps=4, stages=3)
"""Within two per cent of the fastest of eight each on an H200. Groups wider than 2048 channels are not prefetched, nor
timed."""


@triton.jit
def _mask(n_R, last, c_C, W: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr):
    """Which numbers of a tile there are."""
    mask = (n_R < last)[:, None]
    if (TILE + 1) * C > W:
        mask = mask & (c_C < W)[None, :]
    return mask


@triton.jit
def _load(x_NW, n_R, last, stride, UNIT: tl.constexpr, W: tl.constexpr, C: tl.constexpr):
    """The tiles of some rows, which begin at multiples of stride * UNIT."""
    tiles = ()
    for tile in tl.static_range((W + C - 1) // C):
        c_C = tile * C + tl.arange(0, C)
        places_RC = n_R.to(tl.int64)[:, None] * stride * UNIT + c_C[None, :]
        tiles += (tl.load(x_NW + places_RC, mask=_mask(n_R, last, c_C, W, tile, C), other=0.0),)
    return tiles


@triton.jit
def _store(x_NW, tiles, n_R, last, stride, W: tl.constexpr, C: tl.constexpr):
    for tile in tl.static_range((W + C - 1) // C):
        c_C = tile * C + tl.arange(0, C)
        places_RC = n_R.to(tl.int64)[:, None] * stride + c_C[None, :]
        tl.store(x_NW + places_RC, tiles[tile].to(x_NW.dtype.element_ty), mask=_mask(n_R, last, c_C, W, tile, C))


@triton.jit
def _load_of_channels(x, group, W: tl.constexpr, C: tl.constexpr, P: tl.constexpr):
    """Tiles of what P channels side by side share."""
    tiles = ()
    for tile in tl.static_range((W + C - 1) // C):
        c_C = tile * C + tl.arange(0, C)
        tiles += (tl.load(x + (group * W + c_C) // P, mask=c_C < W, other=0.0).to(tl.float32)[None, :],)
    return tiles


@triton.jit
def _parts(y_RC, values_RC, skip_1C, gate_RC):
    """What is gated, the sigmoid of the gate and its SiLU."""
    z_RC = gate_RC.to(tl.float32)
    sigmoid_RC = tl.sigmoid(z_RC)
    return y_RC.to(tl.float32) + skip_1C * values_RC.to(tl.float32), sigmoid_RC, z_RC * sigmoid_RC


@triton.jit
def _forward_kernel(
    y_NO, values_NO, skip_H, gate_NO, weight_O, normed_NO, N, stride_y, stride_values, stride_gate, epsilon,
    UNIT: tl.constexpr, G: tl.constexpr, W: tl.constexpr, P: tl.constexpr,
    TOKENS: tl.constexpr, R: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (W + C - 1) // C
    group, first = tl.program_id(0) % G, tl.program_id(0) // G * TOKENS
    last, o = tl.minimum(first + TOKENS, N), group * W
    skips = _load_of_channels(skip_H, group, W, C, P)
    weights = _load_of_channels(weight_O, group, W, C, 1)
    for step in tl.range(0, (TOKENS + R - 1) // R, num_stages=STAGES):
        n_R = first + step * R + tl.arange(0, R)
        ys = _load(y_NO + o, n_R, last, stride_y, UNIT, W, C)
        values = _load(values_NO + o, n_R, last, stride_values, UNIT, W, C)
        gates = _load(gate_NO + o, n_R, last, stride_gate, UNIT, W, C)
        gated, squares_RC = (), tl.zeros((R, C), tl.float32)
        for tile in tl.static_range(TILES):
            u_RC, _sigmoid_RC, silu_RC = _parts(ys[tile], values[tile], skips[tile], gates[tile])
            gated += (u_RC * silu_RC,)
            squares_RC += gated[tile] * gated[tile]
        scale_R = tl.rsqrt(tl.sum(squares_RC, 1) / W + epsilon)
        normed = ()
        for tile in tl.static_range(TILES):
            normed += (weights[tile] * (gated[tile] * scale_R[:, None]),)
        _store(normed_NO + o, normed, n_R, last, G * W, W, C)


@triton.jit
def _backward_kernel(
    d_normed_NO, y_NO, values_NO, skip_H, gate_NO, weight_O, d_y_NO, d_values_NO, d_gate_NO, sums_QXO,
    N, stride_y, stride_values, stride_gate, epsilon,
    UNIT: tl.constexpr, G: tl.constexpr, W: tl.constexpr, P: tl.constexpr,
    TOKENS: tl.constexpr, R: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (W + C - 1) // C
    group, first = tl.program_id(0) % G, tl.program_id(0) // G * TOKENS
    last, o = tl.minimum(first + TOKENS, N), group * W
    skips = _load_of_channels(skip_H, group, W, C, P)
    weights = _load_of_channels(weight_O, group, W, C, 1)
    zeros = ()
    for _ in tl.static_range(TILES):
        zeros += (tl.zeros((R, C), tl.float32),)
    d_skips, d_weights = zeros, zeros
    for step in tl.range(0, (TOKENS + R - 1) // R, num_stages=STAGES):
        n_R = first + step * R + tl.arange(0, R)
        d_normed = _load(d_normed_NO + o, n_R, last, G * W, 1, W, C)
        ys = _load(y_NO + o, n_R, last, stride_y, UNIT, W, C)
        values = _load(values_NO + o, n_R, last, stride_values, UNIT, W, C)
        gates = _load(gate_NO + o, n_R, last, stride_gate, UNIT, W, C)
        squares_RC, products_RC = tl.zeros((R, C), tl.float32), tl.zeros((R, C), tl.float32)
        for tile in tl.static_range(TILES):
            u_RC, sigmoid_RC, silu_RC = _parts(ys[tile], values[tile], skips[tile], gates[tile])
            a_RC, d_n_RC = u_RC * silu_RC, weights[tile] * d_normed[tile].to(tl.float32)
            squares_RC += a_RC * a_RC
            products_RC += a_RC * d_n_RC
        scale_R = tl.rsqrt(tl.sum(squares_RC, 1) / W + epsilon)
        share_R = tl.sum(products_RC, 1) / W * scale_R * scale_R
        d_ys, d_values, d_gates, more_skips, more_weights = (), (), (), (), ()
        for tile in tl.static_range(TILES):
            u_RC, sigmoid_RC, silu_RC = _parts(ys[tile], values[tile], skips[tile], gates[tile])
            a_RC, d_RC = u_RC * silu_RC, d_normed[tile].to(tl.float32)
            d_a_RC = scale_R[:, None] * (weights[tile] * d_RC - a_RC * share_R[:, None])
            d_u_RC = d_a_RC * silu_RC
            d_ys += (d_u_RC,)
            d_values += (d_u_RC * skips[tile],)
            d_gates += (d_a_RC * u_RC * (sigmoid_RC + silu_RC * (1 - sigmoid_RC)),)
            more_skips += (d_skips[tile] + d_u_RC * values[tile].to(tl.float32),)
            more_weights += (d_weights[tile] + d_RC * (a_RC * scale_R[:, None]),)
        d_skips, d_weights = more_skips, more_weights
        _store(d_y_NO + o, d_ys, n_R, last, G * W, W, C)
        _store(d_values_NO + o, d_values, n_R, last, G * W, W, C)
        _store(d_gate_NO + o, d_gates, n_R, last, G * W, W, C)

    sums_XO = sums_QXO + tl.program_id(0).to(tl.int64) // G * 2 * G * W
    for tile in tl.static_range(TILES):
        c_C = tile * C + tl.arange(0, C)
        tl.store(sums_XO + o + c_C, tl.sum(d_skips[tile], 0), mask=c_C < W)
        tl.store(sums_XO + (G * W + o) + c_C, tl.sum(d_weights[tile], 0), mask=c_C < W)


def gated_norm(
    y_BTO: Tensor, values_BTO: Tensor, skip_H: Tensor, gate_BTO: Tensor, weight_O: Tensor, groups: int, epsilon: float
) -> Tensor:
    """As `reference.gated_norm`, in one pass."""
    y_NO, values_NO, gate_NO = _rows(y_BTO), _rows(values_BTO), _rows(gate_BTO)
    normed_BTO = gate_BTO.new_empty(gate_BTO.shape)
    _forward_kernel[_grid(len(gate_NO), groups, FORWARD)](
        y_NO, values_NO, skip_H.contiguous(), gate_NO, weight_O.contiguous(), normed_BTO,
        epsilon=epsilon, **_sizes(y_NO, values_NO, gate_NO, len(skip_H), groups, FORWARD),
    )  # fmt: skip
    return normed_BTO


def gated_norm_backward(
    d_normed_BTO: Tensor, y_BTO: Tensor, values_BTO: Tensor, skip_H: Tensor, gate_BTO: Tensor, weight_O: Tensor,
    groups: int, epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of y, values, skip, gate and weight."""
    y_NO, values_NO, gate_NO = _rows(y_BTO), _rows(values_BTO), _rows(gate_BTO)
    d_y_BTO, d_values_BTO, d_gate_BTO = (x.new_empty(x.shape) for x in (y_BTO, values_BTO, gate_BTO))
    parts = triton.cdiv(len(gate_NO), BACKWARD.tokens)
    sums_QXO = gate_BTO.new_empty(parts, 2, len(weight_O), dtype=torch.float32)
    _backward_kernel[_grid(len(gate_NO), groups, BACKWARD)](
        d_normed_BTO.contiguous(), y_NO, values_NO, skip_H.contiguous(), gate_NO, weight_O.contiguous(),
        d_y_BTO, d_values_BTO, d_gate_BTO, sums_QXO,
        epsilon=epsilon, **_sizes(y_NO, values_NO, gate_NO, len(skip_H), groups, BACKWARD),
    )  # fmt: skip
    d_skip_O, d_weight_O = sums_QXO[:, 0].sum(0), sums_QXO[:, 1].sum(0)
    d_skip_H = d_skip_O.unflatten(0, (len(skip_H), -1)).sum(1)
    return d_y_BTO, d_values_BTO, d_skip_H.to(skip_H.dtype), d_gate_BTO, d_weight_O.to(weight_O.dtype)


def _rows(x_BTO: Tensor) -> Tensor:
    """Of all sequences, with channels side by side: a view, if it can be."""
    return side_by_side(x_BTO.flatten(0, 1))


def _grid(tokens: int, groups: int, tiling: Tiling) -> tuple[int]:
    return (triton.cdiv(tokens, tiling.tokens) * groups,)


def _sizes(y_NO: Tensor, values_NO: Tensor, gate_NO: Tensor, heads: int, groups: int, tiling: Tiling) -> dict[str, int]:
    """What both kernels are told of shapes, strides and tiles, by name."""
    (tokens, channels), strides = gate_NO.shape, [x.stride(0) for x in (y_NO, values_NO, gate_NO)]
    width = channels // groups
    unit = row_unit(width, *strides)
    of_names = dict(zip(("stride_y", "stride_values", "stride_gate"), (n // unit for n in strides), strict=True))
    return {"N": tokens, "UNIT": unit, "G": groups, "P": channels // heads, **of_names, **_cut(width, tiling)}


def _cut(width: int, tiling: Tiling) -> dict[str, int]:
    """Tiles for groups of a width: as many rows at once as give every thread its numbers."""
    even = triton.next_power_of_2(triton.cdiv(width, tiling.tiles))
    columns = min(triton.next_power_of_2(width), max(NARROWEST, even))
    warps = min(MOST_WARPS, max(tiling.warps, columns // (32 * tiling.vector)))
    rows = max(1, 32 * warps * tiling.vector // columns)
    stages = tiling.stages if warps == tiling.warps else 1  # shared memory might not hold more of rows so wide
    return {"W": width, "R": rows, "C": columns, "TOKENS": tiling.tokens, "STAGES": stages, "num_warps": warps}
