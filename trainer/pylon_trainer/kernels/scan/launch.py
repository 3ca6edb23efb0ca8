"""Launching the kernels: how each is cut up, from shapes that the host knows, and where its results go.

Shapes: as in `kernels.scan.triton`; S splits of a group's tiles, each a program of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from pylon_trainer.kernels.scan.triton import (
    gradients_kernel,
    maps_kernel,
    outputs_kernel,
    sums_kernel,
    sweep_kernel,
)

LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a kernel is cut up."""

    stages: int
    warps: int
    tile: int
    """Of sweep and maps: numbers of a state's N that one program keeps, at most. Of the others: tiles of a group's
    heads that one program takes, at most."""


@dataclass(frozen=True, slots=True)
class Tilings:
    """One for each kernel."""

    chunk_tokens: int
    columns: int
    """Of a head's P that are one tile, at most."""
    sweep: Tiling
    outputs: Tiling
    gradients: Tiling
    maps: Tiling


TENSOR_CORES = {
    64: Tilings(64, 64, Tiling(3, 4, 64), Tiling(4, 4, 24), Tiling(2, 8, 24), Tiling(3, 4, 64)),
    128: Tilings(64, 64, Tiling(3, 4, 64), Tiling(2, 4, 24), Tiling(1, 8, 24), Tiling(3, 4, 128)),
    256: Tilings(64, 64, Tiling(3, 4, 64), Tiling(1, 4, 8), Tiling(1, 8, 24), Tiling(2, 4, 128)),
}
"""By the largest state that they serve, for 16-bit elements and multiprocessors with LARGE_MEMORY_BYTES."""
LARGE_MEMORY_BYTES = 200 * 1024
SMALL_MEMORY = Tilings(32, 32, Tiling(2, 4, 64), Tiling(1, 4, 8), Tiling(1, 4, 8), Tiling(1, 4, 64))
"""For 16-bit elements where shared memory is scarcer."""
FULL_PRECISION = Tilings(32, 32, Tiling(1, 4, 32), Tiling(1, 8, 8), Tiling(1, 8, 8), Tiling(1, 4, 32))
"""float32: every product is three, which leaves few registers. Slow, and exact to about 1e-6."""


@dataclass(frozen=True)
class _Shapes:
    """Sizes of a call, and what kernels are told of them."""

    B: int
    T: int
    H: int
    P: int
    G: int
    N: int
    tilings: Tilings

    @classmethod
    def of(cls, values_BTHP: Tensor, write_BTGN: Tensor) -> _Shapes:
        (B, T, H, P), (_, _, G, N) = values_BTHP.shape, write_BTGN.shape
        return cls(B, T, H, P, G, N, choose_tilings(values_BTHP, write_BTGN))

    @property
    def columns(self) -> int:
        return min(self.tilings.columns, _padded(self.P))

    @property
    def tiles(self) -> int:
        """Of all heads of a group."""
        return self.H // self.G * _parts(self.P, self.columns)

    @property
    def chunks(self) -> int:
        return _parts(self.T, self.tilings.chunk_tokens)

    def constants(self, tiling: Tiling) -> dict[str, int]:
        return {
            "H": self.H,
            "J": self.H // self.G,
            "N": self.N,
            "P": self.P,
            "TILES": _parts(self.P, self.columns),
            "Q": self.tilings.chunk_tokens,
            "P_TILE": self.columns,
            "num_stages": tiling.stages,
            "num_warps": tiling.warps,
        }


def forward(
    values_BTHP: Tensor, steps_BTH: Tensor, decays_BTH: Tensor, write_BTGN: Tensor, read_BTGN: Tensor,
    state_BHNP: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the state after the last token, and the states that enter the chunks, B x C x H x N x P."""
    values_BTHP, write_BTGN, read_BTGN = _dense_rows(values_BTHP), _dense_rows(write_BTGN), _dense_rows(read_BTGN)
    shapes = _Shapes.of(values_BTHP, write_BTGN)
    steps_BTH, sums_BTH = steps_BTH.contiguous(), _sums(decays_BTH, shapes, LOG2_E)
    states_BCHNP, final_BHNP = _sweep(values_BTHP, write_BTGN, steps_BTH, sums_BTH, state_BHNP, shapes, reverse=False)
    y_BTHP = values_BTHP.new_empty(values_BTHP.shape)
    tiling = shapes.tilings.outputs
    outputs_kernel[(_parts(shapes.tiles, tiling.tile), shapes.chunks, shapes.B * shapes.G)](
        values_BTHP, write_BTGN, read_BTGN, steps_BTH, sums_BTH, states_BCHNP, y_BTHP, shapes.T,
        *values_BTHP.stride()[:2], *write_BTGN.stride()[:2], *read_BTGN.stride()[:2],
        **shapes.constants(tiling), N_PADDED=_padded(shapes.N), V_PROGRAM=min(tiling.tile, shapes.tiles),
    )  # fmt: skip
    return y_BTHP, final_BHNP, states_BCHNP


def backward(
    d_y_BTHP: Tensor, d_final_BHNP: Tensor | None, values_BTHP: Tensor, steps_BTH: Tensor, decays_BTH: Tensor,
    write_BTGN: Tensor, read_BTGN: Tensor, states_BCHNP: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of values, steps, decays, write, read and of the state before the first token."""
    d_y_BTHP, values_BTHP = _dense_rows(d_y_BTHP), _dense_rows(values_BTHP)
    write_BTGN, read_BTGN = _dense_rows(write_BTGN), _dense_rows(read_BTGN)
    shapes = _Shapes.of(values_BTHP, write_BTGN)
    steps_BTH, sums_BTH = steps_BTH.contiguous(), _sums(decays_BTH, shapes, LOG2_E)
    d_states_BCHNP, d_state_BHNP = _sweep(d_y_BTHP, read_BTGN, steps_BTH, sums_BTH, d_final_BHNP, shapes, reverse=True)
    tiling = shapes.tilings.gradients
    splits, Q = _parts(shapes.tiles, tiling.tile), shapes.tilings.chunk_tokens
    d_values_BTHP = values_BTHP.new_empty(values_BTHP.shape)
    d_steps_BTHK = steps_BTH.new_empty(*steps_BTH.shape, _parts(shapes.P, shapes.columns))
    d_sums_BTHK = torch.empty_like(d_steps_BTHK)
    d_scores_SBCGQQ = values_BTHP.new_empty(splits, shapes.B, shapes.chunks, shapes.G, Q, Q)
    gradients_kernel[(splits, shapes.chunks, shapes.B * shapes.G)](
        d_y_BTHP, values_BTHP, write_BTGN, read_BTGN, steps_BTH, sums_BTH, states_BCHNP, d_states_BCHNP,
        d_values_BTHP, d_steps_BTHK, d_sums_BTHK, d_scores_SBCGQQ, shapes.T, shapes.B,
        *d_y_BTHP.stride()[:2], *values_BTHP.stride()[:2], *write_BTGN.stride()[:2], *read_BTGN.stride()[:2],
        **shapes.constants(tiling), N_PADDED=_padded(shapes.N), V_PROGRAM=min(tiling.tile, shapes.tiles),
    )  # fmt: skip
    d_write_BTGN = _d_maps(
        values_BTHP, d_states_BCHNP, steps_BTH, sums_BTH, d_scores_SBCGQQ, read_BTGN, shapes, reverse=False
    )
    d_read_BTGN = _d_maps(
        d_y_BTHP, states_BCHNP, steps_BTH, sums_BTH, d_scores_SBCGQQ, write_BTGN, shapes, reverse=True
    )
    d_decays_BTH = _sums(_over_tiles(d_sums_BTHK), shapes, 1.0, reverse=True)
    return d_values_BTHP, _over_tiles(d_steps_BTHK), d_decays_BTH, d_write_BTGN, d_read_BTGN, d_state_BHNP


def _sums(x_BTH: Tensor, shapes: _Shapes, factor: float, *, reverse: bool = False) -> Tensor:
    """Running sums within chunks, float32."""
    sums_BTH = x_BTH.new_empty(x_BTH.shape)
    sums_kernel[(shapes.chunks, shapes.B)](
        x_BTH.contiguous(), sums_BTH, shapes.T, factor,
        REVERSE=reverse, H=shapes.H, H_PADDED=triton.next_power_of_2(shapes.H), Q=shapes.tilings.chunk_tokens,
    )  # fmt: skip
    return sums_BTH


def _sweep(
    x_BTHP: Tensor, maps_BTGN: Tensor, steps_BTH: Tensor, sums_BTH: Tensor, first_BHNP: Tensor | None,
    shapes: _Shapes, *, reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As sweep_kernel has it: states in the type of x, and the last one, float32."""
    s, tiling = shapes, shapes.tilings.sweep
    states_BCHNP = x_BTHP.new_empty(s.B, s.chunks, s.H, s.N, s.P)
    last_BHNP = steps_BTH.new_empty(s.B, s.H, s.N, s.P)
    numbers = min(tiling.tile, _padded(s.N))
    sweep_kernel[(s.G * s.tiles, s.B, _parts(s.N, numbers))](
        x_BTHP, maps_BTGN, steps_BTH, sums_BTH, None if first_BHNP is None else first_BHNP.contiguous(),
        states_BCHNP, last_BHNP, s.T, *x_BTHP.stride()[:2], *maps_BTGN.stride()[:2],
        REVERSE=reverse, HAS_FIRST=first_BHNP is not None, N_TILE=numbers, **s.constants(tiling),
    )  # fmt: skip
    return states_BCHNP, last_BHNP


def _d_maps(
    x_BTHP: Tensor, states_BCHNP: Tensor, steps_BTH: Tensor, sums_BTH: Tensor, d_scores_SBCGQQ: Tensor,
    others_BTGN: Tensor, shapes: _Shapes, *, reverse: bool,
) -> Tensor:  # fmt: skip
    """As maps_kernel has it."""
    s, tiling = shapes, shapes.tilings.maps
    numbers = min(tiling.tile, _padded(s.N))
    d_maps_BTGN = others_BTGN.new_empty(others_BTGN.shape)
    maps_kernel[(_parts(s.N, numbers), s.chunks, s.B * s.G)](
        x_BTHP, states_BCHNP, steps_BTH, sums_BTH, d_scores_SBCGQQ, others_BTGN, d_maps_BTGN, s.T, s.B,
        d_scores_SBCGQQ.shape[0], *x_BTHP.stride()[:2], *others_BTGN.stride()[:2],
        REVERSE=reverse, N_TILE=numbers, **s.constants(tiling),
    )  # fmt: skip
    return d_maps_BTGN


def _over_tiles(x_BTHK: Tensor) -> Tensor:
    """The sum over the tiles of a head, which mostly has one."""
    return x_BTHK.squeeze(-1) if x_BTHK.shape[-1] == 1 else x_BTHK.sum(-1)


def _dense_rows(x: Tensor) -> Tensor:
    """With its last two dims as one run of numbers."""
    is_dense = x.stride(-1) == 1 and (x.shape[-2] == 1 or x.stride(-2) == x.shape[-1])
    return x if is_dense else x.contiguous()


def _parts(size: int, largest: int) -> int:
    return -(-size // largest)


def _padded(size: int) -> int:
    """What a tile of so many rows or columns must be, to be multiplied."""
    return max(16, 1 << (size - 1).bit_length())


def choose_tilings(values_BTHP: Tensor, write_BTGN: Tensor) -> Tilings:
    """Those for values of this type and states of this size on their device."""
    if values_BTHP.itemsize == 4:
        return FULL_PRECISION
    if torch.cuda.get_device_properties(values_BTHP.device).shared_memory_per_block_optin < LARGE_MEMORY_BYTES:
        return SMALL_MEMORY
    return next(tilings for size, tilings in TENSOR_CORES.items() if write_BTGN.shape[3] <= size)
