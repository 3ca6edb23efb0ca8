"""The kernels as operators of PyTorch, which compiled code calls without looking inside, and their gradient.

Shapes: as in `kernels.attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("pylon::attend_rows", mutates_args=())
def attend_rows(
    q_HKE: Tensor,
    k_BJTE: Tensor,
    v_BJTE: Tensor,
    own_k_JKE: Tensor | None,  # noqa: ARG001
    own_v_JKE: Tensor | None,  # noqa: ARG001
    known_y_NHE: Tensor | None,
    known_logsumexp_NH: Tensor | None,
    rows_K: Tensor,
    first_K: Tensor,
    ends_B: Tensor,
    until_K: Tensor,  # noqa: ARG001
    scale: float,
    windowed: bool,
) -> tuple[Tensor, Tensor]:
    """What the rows see, K x H x E, and the logarithm (base 2) of their sum of exponentials, K x H: read off what
    attend_all gave, if that is known. The rows' own keys and values, and until_K, matter to the gradient alone: values
    are read from among the others."""
    if known_y_NHE is not None and known_logsumexp_NH is not None:
        return known_y_NHE.index_select(0, rows_K), known_logsumexp_NH.index_select(0, rows_K)
    from pylon_trainer.kernels.attention import launch

    return launch.forward(q_HKE, k_BJTE, v_BJTE, rows_K, first_K, ends_B, scale, windowed)


@torch.library.custom_op("pylon::attend_all", mutates_args=())
def attend_all(q_BHTE: Tensor, k_BJTE: Tensor, v_BJTE: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What every token sees of its sequence up to itself, N x H x E, and the logarithm (base 2) of its sum of
    exponentials, N x H, by whichever of PyTorch's kernels it would choose itself, if that tells the sum."""
    from pylon_trainer.kernels.attention import launch

    return launch.forward_all(q_BHTE, k_BJTE, v_BJTE, scale)


@torch.library.custom_op("pylon::attend_rows_d_queries", mutates_args=())
def _d_queries(
    d_y_KHE: Tensor,
    q_HKE: Tensor,
    k_BJTE: Tensor,
    v_BJTE: Tensor,
    y_KHE: Tensor,
    logsumexp_KH: Tensor,
    rows_K: Tensor,
    first_K: Tensor,
    ends_B: Tensor,
    scale: float,
    windowed: bool,
) -> tuple[Tensor, Tensor]:
    from pylon_trainer.kernels.attention import launch

    return launch.d_queries(
        d_y_KHE, q_HKE, k_BJTE, v_BJTE, y_KHE, logsumexp_KH, rows_K, first_K, ends_B, scale, windowed
    )


@torch.library.custom_op("pylon::attend_rows_d_keys", mutates_args=())
def _d_keys(
    d_y_KHE: Tensor,
    q_HKE: Tensor,
    k_BJTE: Tensor,
    v_BJTE: Tensor,
    logsumexp_KH: Tensor,
    delta_KH: Tensor,
    rows_K: Tensor,
    first_K: Tensor,
    keys_L: Tensor,
    from_L: Tensor,
    until_L: Tensor,
    key_ends_B: Tensor,
    scale: float,
    windowed: bool,
) -> tuple[Tensor, Tensor]:
    from pylon_trainer.kernels.attention import launch

    return launch.d_keys(
        d_y_KHE, q_HKE, k_BJTE, v_BJTE, logsumexp_KH, delta_KH,
        rows_K, first_K, keys_L, from_L, until_L, key_ends_B, scale, windowed,
    )  # fmt: skip


@attend_rows.register_fake
def _(q_HKE: Tensor, *others: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    H, K, E = q_HKE.shape
    return q_HKE.new_empty(K, H, E), q_HKE.new_empty(K, H, dtype=torch.float32)


@attend_all.register_fake
def _(q_BHTE: Tensor, *others: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    B, H, T, E = q_BHTE.shape
    return q_BHTE.new_empty(B * T, H, E), q_BHTE.new_empty(B * T, H, dtype=torch.float32)


@_d_queries.register_fake
def _(d_y_KHE: Tensor, *others: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return d_y_KHE.new_empty(d_y_KHE.shape), d_y_KHE.new_empty(d_y_KHE.shape[:2], dtype=torch.float32)


@_d_keys.register_fake
def _(
    d_y_KHE: Tensor,  # noqa: ARG001
    q_HKE: Tensor,  # noqa: ARG001
    k_BJTE: Tensor,
    v_BJTE: Tensor,
    logsumexp_KH: Tensor,  # noqa: ARG001
    delta_KH: Tensor,  # noqa: ARG001
    rows_K: Tensor,  # noqa: ARG001
    first_K: Tensor,  # noqa: ARG001
    keys_L: Tensor,
    *others: Any,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    shape = keys_L.shape[0], k_BJTE.shape[1], k_BJTE.shape[3]
    return k_BJTE.new_empty(shape), v_BJTE.new_empty(shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_HKE, k_BJTE, v_BJTE, _, _, _, _, *layout, scale, windowed = inputs
    ctx.save_for_backward(q_HKE, k_BJTE, v_BJTE, *output, *layout)
    ctx.scale, ctx.windowed = scale, windowed


def _backward(ctx: Any, d_y_KHE: Tensor, d_logsumexp_KH: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ARG001
    q_HKE, k_BJTE, v_BJTE, y_KHE, logsumexp_KH, rows_K, first_K, ends_B, until_K = ctx.saved_tensors
    _, needs_k, needs_v, needs_own_k, needs_own_v, *_ = ctx.needs_input_grad
    d_q_KHE, delta_KH = _d_queries(
        d_y_KHE, q_HKE, k_BJTE, v_BJTE, y_KHE, logsumexp_KH, rows_K, first_K, ends_B, ctx.scale, ctx.windowed
    )
    statistics = d_y_KHE, q_HKE, k_BJTE, v_BJTE, logsumexp_KH, delta_KH, rows_K, first_K
    d_k = d_v = d_own_k = d_own_v = None
    if needs_own_k or needs_own_v:
        each_K = torch.arange(rows_K.shape[0], dtype=torch.int32, device=rows_K.device)
        d_keys_KJE = _d_keys(*statistics, rows_K, each_K, until_K, ends_B, ctx.scale, ctx.windowed)
        d_own_k, d_own_v = (d_KJE.transpose(0, 1) for d_KJE in d_keys_KJE)
    if needs_k or needs_v:
        B, _, T, _ = k_BJTE.shape
        keys_N = torch.arange(B * T, dtype=torch.int32, device=rows_K.device)
        from_N = torch.searchsorted(rows_K, keys_N, out_int32=True)
        until_N = torch.searchsorted(first_K, keys_N, out_int32=True, right=True)
        d_keys_NJE = _d_keys(*statistics, keys_N, from_N, until_N, keys_N[T - 1 :: T] + 1, ctx.scale, ctx.windowed)
        d_k, d_v = (d_NJE.unflatten(0, (B, T)).transpose(1, 2) for d_NJE in d_keys_NJE)
    return d_q_KHE.transpose(0, 1), d_k, d_v, d_own_k, d_own_v, *[None] * 8


attend_rows.register_autograd(_backward, setup_context=_save)
