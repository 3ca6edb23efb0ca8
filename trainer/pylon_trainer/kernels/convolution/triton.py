"""The convolution, each way in one pass over memory.

A program walks over the tokens of a part of a sequence, with a row of channels in registers: the inputs that the
convolution still sees, and backward the gradients that inputs have still to receive. So every number is read once, but
for the V tokens by which parts overlap. ROWS tokens are loaded at a time, to have enough of memory on its way.

Backward, with z what SiLU is applied to and d_z its gradient, token t gives weight_uw * d_z to each input that it saw,
and that input times d_z to weight_uw. What weights and biases receive is summed per program, and a second, small sum
joins the programs. The order of every sum depends on the shapes alone: the same input gives the same bits.

Shapes: B sequences, T tokens, U channels, W tokens that the convolution sees, V = W - 1, P parts of TOKENS tokens in
all sequences, C channels of a program. A window is a tuple of W rows of C: of a token and of those before it, in that
order.
"""

# mypy: disable-error-code="assignment"
# Tuples that grow by a row at a time change their type.

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pylon_trainer.kernels.rows import row_unit, side_by_side


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a kernel is cut up."""

    tokens: int
    """Of a part."""
    rows: int
    """Tokens loaded at a time."""
    channels: int
    """Of a program, a power of 2."""
    warps: int


FORWARD = Tiling(tokens=64, rows=16, channels=256, warps=4)
BACKWARD = Tiling(tokens=128, rows=4, channels=256, warps=2)
"""The fastest of eight each on an H200, by a few per cent."""


@triton.jit
def _begin(U, TOKENS: tl.constexpr, C: tl.constexpr):
    """A program's sequence, first token and channels."""
    tiles = tl.cdiv(U, C)
    u_C = tl.program_id(0) % tiles * C + tl.arange(0, C)
    return tl.program_id(1).to(tl.int64), tl.program_id(0) // tiles * TOKENS, u_C


@triton.jit
def _weights(weight_UW, u_C, U, W: tl.constexpr):
    """Of every lag."""
    weights = ()
    for lag in tl.static_range(W):
        weights += (tl.load(weight_UW + u_C * W + W - 1 - lag, mask=u_C < U, other=0.0).to(tl.float32),)
    return weights


@triton.jit
def _has(u_C, U, is_token):
    """Which channels there are, of a token that may not be one."""
    return u_C < tl.where(is_token, U, 0)


@triton.jit
def _load(x_TU, t, T, stride_t, u_C, U):
    return tl.load(x_TU + t.to(tl.int64) * stride_t + u_C, mask=_has(u_C, U, (t >= 0) & (t < T)), other=0.0)


@triton.jit
def _first_window(x_TU, recent_VU, first, T, stride_t, u_C, U, W: tl.constexpr):
    """Of the token before the first, but for the row that leaves it next."""
    window = ()
    for lag in tl.static_range(1, W):
        t = first - lag
        row_C = _load(x_TU, t, T, stride_t, u_C, U).to(tl.float32)
        if recent_VU is not None:
            recent_C = tl.load(recent_VU + (W - 1 + t) * U + u_C, mask=_has(u_C, U, t < 0), other=0.0)
            row_C += recent_C.to(tl.float32)
        window += (row_C,)
    window += (tl.zeros_like(u_C).to(tl.float32),)
    return window


@triton.jit
def _moved(row_C, window, W: tl.constexpr):
    """The window a token later."""
    moved = (row_C,)
    for lag in tl.static_range(1, W):
        moved += (window[lag - 1],)
    return moved


@triton.jit
def _own(window, starts_T, t, T, W: tl.constexpr):
    """The window, with 0 for tokens of other documents."""
    own = window
    if starts_T is not None:
        start = tl.load(starts_T + t, mask=t < T, other=0)
        own = (window[0],)
        for lag in tl.static_range(1, W):
            own += (tl.where(t - lag >= start, window[lag], 0.0),)
    return own


@triton.jit
def _sum(window, weights, bias_C, W: tl.constexpr):
    sum_C = bias_C
    for lag in tl.static_range(W):
        sum_C += weights[lag] * window[lag]
    return sum_C


@triton.jit
def _forward_kernel(
    x_BTU, weight_UW, bias_U, starts_BT, recent_BVU, y_BTU, T, U, stride_b, stride_t,
    UNIT: tl.constexpr, W: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    U, stride_t = U * UNIT, stride_t * UNIT
    b, first, u_C = _begin(U, TOKENS, C)
    x_TU, y_TU = x_BTU + b * stride_b * UNIT, y_BTU + b * T * U
    starts_T = None if starts_BT is None else starts_BT + b * T
    recent_VU = None if recent_BVU is None else recent_BVU + b * (W - 1) * U
    weights, bias_C = _weights(weight_UW, u_C, U, W), tl.load(bias_U + u_C, mask=u_C < U, other=0.0).to(tl.float32)
    window = _first_window(x_TU, recent_VU, first, T, stride_t, u_C, U, W)
    for step in range(TOKENS // ROWS):
        rows = ()
        for row in tl.static_range(ROWS):
            rows += (_load(x_TU, first + step * ROWS + row, T, stride_t, u_C, U),)
        for row in tl.static_range(ROWS):
            t = first + step * ROWS + row
            window = _moved(rows[row].to(tl.float32), window, W)
            z_C = _sum(_own(window, starts_T, t, T, W), weights, bias_C, W)
            y_C = z_C * tl.sigmoid(z_C)
            tl.store(y_TU + t.to(tl.int64) * U + u_C, y_C.to(y_TU.dtype.element_ty), mask=_has(u_C, U, t < T))


@triton.jit
def _backward_kernel(
    d_y_BTU, x_BTU, weight_UW, bias_U, starts_BT, recent_BVU, d_x_BTU, d_recent_BVU, sums_PXU, T, U, stride_b, stride_t,
    UNIT: tl.constexpr, W: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    U, stride_t = U * UNIT, stride_t * UNIT
    b, first, u_C = _begin(U, TOKENS, C)
    last = tl.minimum(first + TOKENS, T)
    x_TU, d_y_TU, d_x_TU = x_BTU + b * stride_b * UNIT, d_y_BTU + b * T * U, d_x_BTU + b * T * U
    d_recent_VU = d_recent_BVU + b * (W - 1) * U
    starts_T = None if starts_BT is None else starts_BT + b * T
    recent_VU = None if recent_BVU is None else recent_BVU + b * (W - 1) * U
    weights, bias_C = _weights(weight_UW, u_C, U, W), tl.load(bias_U + u_C, mask=u_C < U, other=0.0).to(tl.float32)
    window = _first_window(x_TU, recent_VU, first, T, stride_t, u_C, U, W)
    zeros_C = tl.zeros_like(bias_C)
    d_window, d_weights, d_bias_C = (), (), zeros_C
    for _ in tl.static_range(W):
        d_window += (zeros_C,)
        d_weights += (zeros_C,)
    # As far as tokens saw inputs of this part.
    for step in range((TOKENS + W - 1 + ROWS - 1) // ROWS):
        rows, d_rows = (), ()
        for row in tl.static_range(ROWS):
            rows += (_load(x_TU, first + step * ROWS + row, T, stride_t, u_C, U),)
            d_rows += (_load(d_y_TU, first + step * ROWS + row, T, U, u_C, U),)
        for row in tl.static_range(ROWS):
            t = first + step * ROWS + row
            window = _moved(rows[row].to(tl.float32), window, W)
            own = _own(window, starts_T, t, T, W)
            z_C = _sum(own, weights, bias_C, W)
            sigmoid_C = tl.sigmoid(z_C)
            d_z_C = d_rows[row].to(tl.float32) * sigmoid_C * (1 + z_C * (1 - sigmoid_C))
            # The window has moved on by a token: what the last one lacks is given now.
            given = ()
            for lag in tl.static_range(W):
                given += (weights[lag] * d_z_C,)
            d_own = _own(given, starts_T, t, T, W)
            d_window = _moved(zeros_C, d_window, W)
            received, sums = (), ()
            counted_C = tl.where(t < last, d_z_C, 0.0)  # later tokens are another program's
            for lag in tl.static_range(W):
                received += (d_window[lag] + d_own[lag],)
                sums += (d_weights[lag] + own[lag] * counted_C,)
            d_window, d_weights = received, sums
            d_bias_C += counted_C
            done, d_x_C = t - (W - 1), d_window[W - 1].to(d_x_TU.dtype.element_ty)
            tl.store(d_x_TU + done.to(tl.int64) * U + u_C, d_x_C, mask=_has(u_C, U, (done >= first) & (done < last)))
            tl.store(d_recent_VU + t * U + u_C, d_x_C, mask=_has(u_C, U, done < 0))

    sums_XU = sums_PXU + (b * tl.cdiv(T, TOKENS) + first // TOKENS) * (W + 1) * U + u_C
    for lag in tl.static_range(W):
        tl.store(sums_XU + (W - 1 - lag) * U, d_weights[lag], mask=u_C < U)
    tl.store(sums_XU + W * U, d_bias_C, mask=u_C < U)


def convolve(
    x_BTU: Tensor, weight_UW: Tensor, bias_U: Tensor, starts_BT: Tensor | None, recent_BVU: Tensor | None
) -> Tensor:
    """As `reference.convolve`, in one pass."""
    x_BTU = side_by_side(x_BTU)
    y_BTU = x_BTU.new_empty(x_BTU.shape)
    _forward_kernel[_grid(x_BTU, FORWARD)](
        x_BTU, weight_UW.contiguous(), bias_U.contiguous(), _contiguous(starts_BT), _contiguous(recent_BVU), y_BTU,
        *_sizes(x_BTU), **_constants(x_BTU, weight_UW, FORWARD),
    )  # fmt: skip
    return y_BTU


def convolve_backward(
    d_y_BTU: Tensor, x_BTU: Tensor, weight_UW: Tensor, bias_U: Tensor, starts_BT: Tensor | None,
    recent_BVU: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias and of the recent inputs, also where those are not given."""
    x_BTU = side_by_side(x_BTU)
    (B, T, U), W = x_BTU.shape, weight_UW.shape[1]
    d_x_BTU, d_recent_BVU = x_BTU.new_empty(B, T, U), x_BTU.new_empty(B, W - 1, U)
    sums_PXU = x_BTU.new_empty(B * triton.cdiv(T, BACKWARD.tokens), W + 1, U, dtype=torch.float32)
    _backward_kernel[_grid(x_BTU, BACKWARD)](
        d_y_BTU.contiguous(), x_BTU, weight_UW.contiguous(), bias_U.contiguous(), _contiguous(starts_BT),
        _contiguous(recent_BVU), d_x_BTU, d_recent_BVU, sums_PXU,
        *_sizes(x_BTU), **_constants(x_BTU, weight_UW, BACKWARD),
    )  # fmt: skip
    d_weight_UW, d_bias_U = sums_PXU[:, :W].sum(0).T.contiguous(), sums_PXU[:, W].sum(0)
    return d_x_BTU, d_weight_UW.to(weight_UW.dtype), d_bias_U.to(bias_U.dtype), d_recent_BVU


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _grid(x_BTU: Tensor, tiling: Tiling) -> tuple[int, int]:
    B, T, U = x_BTU.shape
    return triton.cdiv(T, tiling.tokens) * triton.cdiv(U, tiling.channels), B


def _unit(x_BTU: Tensor) -> int:
    return row_unit(x_BTU.shape[2], *x_BTU.stride()[:2])


def _sizes(x_BTU: Tensor) -> tuple[int, int, int, int]:
    """T, U and the strides of x, all but T in units."""
    unit = _unit(x_BTU)
    return x_BTU.shape[1], x_BTU.shape[2] // unit, x_BTU.stride(0) // unit, x_BTU.stride(1) // unit


def _constants(x_BTU: Tensor, weight_UW: Tensor, tiling: Tiling) -> dict[str, int]:
    return {
        "UNIT": _unit(x_BTU),
        "W": weight_UW.shape[1],
        "TOKENS": tiling.tokens,
        "ROWS": tiling.rows,
        "C": tiling.channels,
        "num_warps": tiling.warps,
    }
