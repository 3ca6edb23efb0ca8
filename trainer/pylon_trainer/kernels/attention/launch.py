"""Launching the kernels: how each is cut up, from shapes that the host knows, and where its results go.

Shapes: as in `kernels.attention.triton`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend

from pylon_trainer.kernels.attention.triton import d_keys_kernel, d_queries_kernel, forward_kernel
from pylon_trainer.kernels.rows import side_by_side

LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a kernel is cut up."""

    rows: int
    keys: int
    stages: int
    warps: int


@dataclass(frozen=True, slots=True)
class Tilings:
    """One for each kernel."""

    forward: Tiling
    d_queries: Tiling
    d_keys: Tiling


# Measured on an H200 at the shapes of benchmarks/row_attention.py: tiles of 128 rows or keys with eight warps lose up
# to a third, as they leave one program per multiprocessor and span more places.
TENSOR_CORES = {
    128: Tilings(forward=Tiling(64, 64, 3, 4), d_queries=Tiling(64, 32, 3, 4), d_keys=Tiling(32, 64, 2, 4)),
    256: Tilings(forward=Tiling(64, 32, 2, 8), d_queries=Tiling(64, 32, 2, 8), d_keys=Tiling(16, 64, 2, 8)),
}
"""By the largest width of a head that they serve, for 16-bit elements and multiprocessors with LARGE_MEMORY_BYTES."""
LARGE_MEMORY_BYTES = 200 * 1024
SMALL_MEMORY = Tilings(forward=Tiling(64, 32, 2, 4), d_queries=Tiling(32, 32, 1, 4), d_keys=Tiling(16, 32, 1, 4))
"""For 16-bit elements where shared memory is scarcer."""
FULL_PRECISION = Tilings(forward=Tiling(32, 16, 1, 8), d_queries=Tiling(16, 16, 1, 4), d_keys=Tiling(16, 16, 1, 8))
"""float32: every product is three, which leaves few registers. Slow, and exact to about 1e-6."""


def forward(
    q_HKE: Tensor, k_BJTE: Tensor, v_BJTE: Tensor, rows_K: Tensor, first_K: Tensor, ends_B: Tensor,
    scale: float, windowed: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the rows see, K x H x E, and the logarithm (base 2) of their sum of exponentials, float32 K x H."""
    (H, K, E), (B, J, T, _) = q_HKE.shape, k_BJTE.shape
    q_HKE, k_BJTE, v_BJTE = side_by_side(q_HKE), side_by_side(k_BJTE), side_by_side(v_BJTE)
    tiling = choose_tilings(q_HKE).forward
    y_KHE, logsumexp_KH = q_HKE.new_empty(K, H, E), q_HKE.new_empty(K, H, dtype=torch.float32)
    if K:
        forward_kernel[_grid(K * (H // J), tiling.rows, B, J)](
            q_HKE, k_BJTE, v_BJTE, rows_K, first_K, ends_B, y_KHE, logsumexp_KH, B, T, scale * LOG2_E,
            *q_HKE.stride()[:2], *k_BJTE.stride()[:3], *v_BJTE.stride()[:3],
            WINDOWED=windowed, **_constants(H // J, E, B, tiling),
        )  # fmt: skip
    return y_KHE, logsumexp_KH


def forward_all(q_BHTE: Tensor, k_BJTE: Tensor, v_BJTE: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What all tokens see, N x H x E, and the logarithm (base 2) of their sum of exponentials, float32 N x H."""
    B, H, T, E = q_BHTE.shape
    match SDPBackend(torch._fused_sdp_choice(q_BHTE, k_BJTE, v_BJTE, is_causal=True, scale=scale, enable_gqa=True)):
        case SDPBackend.CUDNN_ATTENTION:
            y_BHTE, logsumexp_BHT, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
                q_BHTE, k_BJTE, v_BJTE, None, True, is_causal=True, scale=scale
            )
        case SDPBackend.FLASH_ATTENTION:
            y_BHTE, logsumexp_BHT, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
                q_BHTE, k_BJTE, v_BJTE, is_causal=True, scale=scale
            )
        case _:
            places_N = torch.arange(B * T, dtype=torch.int32, device=q_BHTE.device)
            first_N, ends_B = places_N - places_N % T, places_N[T - 1 :: T] + 1
            q_HNE = q_BHTE.transpose(0, 1).flatten(1, 2)
            return forward(q_HNE, k_BJTE, v_BJTE, places_N, first_N, ends_B, scale, windowed=False)
    logsumexp_NH = logsumexp_BHT.reshape(B, H, T).transpose(1, 2).reshape(B * T, H) * LOG2_E
    return y_BHTE.transpose(1, 2).reshape(B * T, H, E), logsumexp_NH


def d_queries(
    d_y_KHE: Tensor, q_HKE: Tensor, k_BJTE: Tensor, v_BJTE: Tensor, y_KHE: Tensor, logsumexp_KH: Tensor,
    rows_K: Tensor, first_K: Tensor, ends_B: Tensor, scale: float, windowed: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradient of the queries, K x H x E, and delta, float32 K x H."""
    (H, K, E), (B, J, T, _) = q_HKE.shape, k_BJTE.shape
    q_HKE, k_BJTE, v_BJTE = side_by_side(q_HKE), side_by_side(k_BJTE), side_by_side(v_BJTE)
    tiling = choose_tilings(q_HKE).d_queries
    d_q_KHE, delta_KH = torch.empty_like(y_KHE), torch.empty_like(logsumexp_KH)
    if K:
        d_queries_kernel[_grid(K * (H // J), tiling.rows, B, J)](
            d_y_KHE.contiguous(), q_HKE, k_BJTE, v_BJTE, y_KHE, logsumexp_KH, rows_K, first_K, ends_B,
            d_q_KHE, delta_KH, B, T, scale, scale * LOG2_E,
            *q_HKE.stride()[:2], *k_BJTE.stride()[:3], *v_BJTE.stride()[:3],
            WINDOWED=windowed, **_constants(H // J, E, B, tiling),
        )  # fmt: skip
    return d_q_KHE, delta_KH


def d_keys(
    d_y_KHE: Tensor, q_HKE: Tensor, k_BJTE: Tensor, v_BJTE: Tensor, logsumexp_KH: Tensor, delta_KH: Tensor,
    rows_K: Tensor, first_K: Tensor, keys_L: Tensor, from_L: Tensor, until_L: Tensor, key_ends_B: Tensor,
    scale: float, windowed: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the keys and values at places keys_L, each L x J x E. Rows from_L[l] to until_L[l] see key l, in the
    order of rows_K."""
    (H, _, E), (B, J, T, _), L = q_HKE.shape, k_BJTE.shape, len(keys_L)
    q_HKE, k_BJTE, v_BJTE = side_by_side(q_HKE), side_by_side(k_BJTE), side_by_side(v_BJTE)
    tiling = choose_tilings(q_HKE).d_keys
    d_k_LJE, d_v_LJE = k_BJTE.new_empty(L, J, E), v_BJTE.new_empty(L, J, E)
    if L:
        d_keys_kernel[_grid(L, tiling.keys, B, J)](
            d_y_KHE.contiguous(), q_HKE, k_BJTE, v_BJTE, logsumexp_KH, delta_KH,
            rows_K, first_K, keys_L, from_L, until_L, key_ends_B, d_k_LJE, d_v_LJE, B, T, scale, scale * LOG2_E,
            *q_HKE.stride()[:2], *k_BJTE.stride()[:3], *v_BJTE.stride()[:3],
            WINDOWED=windowed, **_constants(H // J, E, B, tiling),
        )  # fmt: skip
    return d_k_LJE, d_v_LJE


def _grid(packed: int, size: int, B: int, J: int) -> tuple[int, int]:
    """Tiles at most, as every sequence may end with one that is not full; by key heads."""
    return triton.cdiv(packed, size) + B, J


def _constants(G: int, E: int, B: int, tiling: Tiling) -> dict[str, int | bool]:
    return {
        "G": G,
        "E": E,
        "E_PADDED": max(16, triton.next_power_of_2(E)),
        "M": tiling.rows,
        "N": tiling.keys,
        "B_PADDED": triton.next_power_of_2(B),
        "num_stages": tiling.stages,
        "num_warps": tiling.warps,
        "enable_fp_fusion": True,
    }


def choose_tilings(q: Tensor) -> Tilings:
    """Those for queries of this type and width on their device."""
    if q.itemsize == 4:
        return FULL_PRECISION
    if torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin < LARGE_MEMORY_BYTES:
        return SMALL_MEMORY
    return next(tilings for width, tilings in TENSOR_CORES.items() if q.shape[-1] <= width)
