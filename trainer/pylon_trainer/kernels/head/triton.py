"""The output head fused with scoring: logits live in the tensor cores' accumulators and are never written.

A program owns a block of rows and a run of vocabulary tiles. It multiplies tile by tile and folds each tile into the
running statistics of `kernels.score.triton`; a small second kernel joins the runs of every row. Order and shape of
every sum depend on the shapes alone: the same input gives the same bits.

Shapes: N rows (tokens), H hidden width, V vocabulary, S runs, C columns of a chunk of logits, K chosen rows;
in a tile: M rows, C columns, P pairs of columns, D elements of the inner product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from pylon_trainer.kernels.score.reference import Scores
from pylon_trainer.kernels.score.triton import LOG2_E, LOWEST, finish, merge_top_two, rescale, store_scores
from pylon_trainer.step import IGNORED

STATISTICS = 5
TMA_ALIGNMENT_BYTES = 16
GRADIENT_BLOCK = 2048


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the product is cut up."""

    rows: int
    columns: int
    depth: int
    run: int
    """Vocabulary tiles that a program folds one after the other."""
    group: int
    """Row blocks that sweep the vocabulary together, so that a weight tile is fetched once for all of them."""
    stages: int
    warps: int


# Measured on an H200 at 16,384 x 49,152 x 2048: four stages are 4 % slower than three, square tiles of 128 9 %. Joining
# the two loops (`flatten`) makes the compiler clear the accumulator with selects in every step and costs 14 %.
TENSOR_CORES = Tiling(rows=128, columns=256, depth=64, run=4, group=32, stages=3, warps=8)
FULL_PRECISION = Tiling(rows=64, columns=64, depth=32, run=16, group=32, stages=2, warps=4)
"""float32 without tensor cores: slow and exact."""


@triton.jit
def _head_kernel(
    hidden_NH, weight_VH, statistics_5SN, N, V, H,
    M: tl.constexpr, C: tl.constexpr, D: tl.constexpr, RUN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, M)
    runs = tl.cdiv(V, RUN * C)
    group = tl.program_id(0) // (GROUP * runs)
    group_blocks = tl.minimum(blocks - group * GROUP, GROUP)
    place = tl.program_id(0) % (GROUP * runs)
    n = (group * GROUP + place % group_blocks) * M
    run = place // group_blocks

    m1_M = tl.full([M], LOWEST, tl.float32)
    m2_M = tl.full([M], LOWEST, tl.float32)
    s_M = tl.zeros([M], tl.float32)
    t_M = tl.zeros([M], tl.float32)
    q_M = tl.zeros([M], tl.float32)
    for v in range(run * RUN * C, tl.minimum((run + 1) * RUN * C, V), C):
        x_MC = tl.zeros([M, C], tl.float32)
        for h in range(0, H, D):
            hidden_MD = hidden_NH.load([n, h])
            weight_CD = weight_VH.load([v, h])
            x_MC = tl.dot(hidden_MD, weight_CD.T, x_MC, input_precision="ieee")
        if v + C > V:
            x_MC = tl.where((v + tl.arange(0, C) < V)[None, :], x_MC, LOWEST)
        # Ordered pairs from the two halves, which the tensor cores' layout leaves in one thread: fewer comparisons.
        left_MP, right_MP = tl.split(tl.permute(tl.reshape(x_MC, [M, 2, C // 2]), [0, 2, 1]))
        first_M, second_M = tl.reduce((tl.maximum(left_MP, right_MP), tl.minimum(left_MP, right_MP)), 1, merge_top_two)
        new_m1_M, m2_M = merge_top_two(m1_M, m2_M, first_M, second_M)
        s_M, t_M, q_M = rescale(m1_M, s_M, t_M, q_M, new_m1_M)
        d_MC = x_MC * LOG2_E - (new_m1_M * LOG2_E)[:, None]
        e_MC = tl.exp2(d_MC)
        s_M += tl.sum(e_MC, 1)
        t_M += tl.sum(d_MC * e_MC, 1)
        q_M += tl.sum(e_MC * e_MC, 1)
        m1_M = new_m1_M

    row_M = n + tl.arange(0, M)
    place_M = run * N + row_M
    tl.store(statistics_5SN + place_M, m1_M, mask=row_M < N)
    tl.store(statistics_5SN + runs * N + place_M, m2_M, mask=row_M < N)
    tl.store(statistics_5SN + 2 * runs * N + place_M, s_M, mask=row_M < N)
    tl.store(statistics_5SN + 3 * runs * N + place_M, t_M, mask=row_M < N)
    tl.store(statistics_5SN + 4 * runs * N + place_M, q_M, mask=row_M < N)


@triton.jit
def _join_kernel(
    hidden_NH, weight_VH, labels_N, statistics_5SN, scores_6N, nonfinite_rows, N, H, S, stride_N, stride_V,
    IGNORED: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    n_M = tl.program_id(0) * M + tl.arange(0, M)
    valid_M = n_M < N
    label_M = tl.load(labels_N + n_M, mask=valid_M, other=IGNORED)
    labelled_M = label_M != IGNORED

    # The label's logit is a product of its own: finding it among the tiles would cost every logit a comparison.
    hidden_M = hidden_NH + n_M.to(tl.int64) * stride_N
    weight_M = weight_VH + tl.where(labelled_M, label_M, 0).to(tl.int64) * stride_V
    product_MD = tl.zeros([M, D], tl.float32)
    for h in range(0, H, D):
        h_D = h + tl.arange(0, D)
        inside_MD = labelled_M[:, None] & (h_D < H)[None, :]
        x_MD = tl.load(hidden_M[:, None] + h_D[None, :], mask=inside_MD, other=0.0).to(tl.float32)
        product_MD += x_MD * tl.load(weight_M[:, None] + h_D[None, :], mask=inside_MD, other=0.0).to(tl.float32)

    m1_M = tl.full([M], LOWEST, tl.float32)
    m2_M = tl.full([M], LOWEST, tl.float32)
    s_M = tl.zeros([M], tl.float32)
    t_M = tl.zeros([M], tl.float32)
    q_M = tl.zeros([M], tl.float32)
    for run in range(0, S):
        run_M = statistics_5SN + run * N + n_M
        first_M = tl.load(run_M, mask=valid_M, other=LOWEST)
        second_M = tl.load(run_M + S * N, mask=valid_M, other=LOWEST)
        run_s_M = tl.load(run_M + 2 * S * N, mask=valid_M, other=0.0)
        run_t_M = tl.load(run_M + 3 * S * N, mask=valid_M, other=0.0)
        run_q_M = tl.load(run_M + 4 * S * N, mask=valid_M, other=0.0)
        new_m1_M, m2_M = merge_top_two(m1_M, m2_M, first_M, second_M)
        s_M, t_M, q_M = rescale(m1_M, s_M, t_M, q_M, new_m1_M)
        run_s_M, run_t_M, run_q_M = rescale(first_M, run_s_M, run_t_M, run_q_M, new_m1_M)
        m1_M, s_M, t_M, q_M = new_m1_M, s_M + run_s_M, t_M + run_t_M, q_M + run_q_M

    entropy, margin, loss, confidence, logsumexp, gradient_norm = finish(
        m1_M, m2_M, s_M, t_M, q_M, tl.sum(product_MD, 1)
    )
    store_scores(
        scores_6N, nonfinite_rows, n_M, N, valid_M, labelled_M,
        entropy, margin, loss, confidence, logsumexp, gradient_norm,
    )  # fmt: skip


@triton.jit
def _logit_gradient(x, c, logsumexp, label, weight):
    p = tl.exp2((x.to(tl.float32) - logsumexp) * LOG2_E)
    return ((p - (c == label).to(tl.float32)) * weight).to(x.dtype)


@triton.jit
def _logit_gradient_kernel(logits_KC, logsumexp_K, labels_K, weights_K, C, stride_K, BLOCK: tl.constexpr):
    k = tl.program_id(0)
    start = tl.program_id(1) * BLOCK
    c = start + tl.arange(0, BLOCK)
    at = logits_KC + k.to(tl.int64) * stride_K + c
    logsumexp, label, weight = tl.load(logsumexp_K + k), tl.load(labels_K + k), tl.load(weights_K + k)
    # Only the last block has a mask, which where C is odd would break up the loads of all others.
    if start + BLOCK <= C:
        tl.store(at, _logit_gradient(tl.load(at), c, logsumexp, label, weight))
    else:
        x = tl.load(at, mask=c < C, other=0.0)
        tl.store(at, _logit_gradient(x, c, logsumexp, label, weight), mask=c < C)


def score(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Scores:
    """As `reference.score`, without logits in memory."""
    return score_tiled(
        hidden_NH, weight_VH, labels_N, FULL_PRECISION if hidden_NH.dtype == torch.float32 else TENSOR_CORES
    )


def score_tiled(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, tiling: Tiling) -> Scores:
    """`score` with a tiling of one's own, for tests and benchmarks."""
    hidden_NH, weight_VH = _aligned(hidden_NH), _aligned(weight_VH)
    (N, H), V = hidden_NH.shape, weight_VH.shape[0]
    runs = triton.cdiv(V, tiling.run * tiling.columns)
    statistics_5SN = hidden_NH.new_empty((STATISTICS, runs, N), dtype=torch.float32)
    scores_6N = hidden_NH.new_empty((6, N), dtype=torch.float32)
    nonfinite_rows = hidden_NH.new_zeros((), dtype=torch.int32)
    if N:
        _head_kernel[(triton.cdiv(N, tiling.rows) * runs,)](
            TensorDescriptor.from_tensor(hidden_NH, [tiling.rows, tiling.depth]),
            TensorDescriptor.from_tensor(weight_VH, [tiling.columns, tiling.depth]),
            statistics_5SN, N, V, H,
            M=tiling.rows, C=tiling.columns, D=tiling.depth, RUN=tiling.run, GROUP=tiling.group,
            num_warps=tiling.warps, num_stages=tiling.stages, enable_fp_fusion=True,
        )  # fmt: skip
        _join_kernel[(triton.cdiv(N, 16),)](
            hidden_NH, weight_VH, labels_N.contiguous(), statistics_5SN, scores_6N, nonfinite_rows, N, H, runs,
            hidden_NH.stride(0), weight_VH.stride(0), IGNORED=IGNORED, M=16, D=128,
        )  # fmt: skip
    return Scores.unpack(scores_6N, nonfinite_rows)


def logit_gradient_(logits_KC: Tensor, logsumexp_K: Tensor, labels_K: Tensor, weights_K: Tensor) -> None:
    """As `reference.logit_gradient_`, in one pass."""
    K, C = logits_KC.shape
    if K and C:
        _logit_gradient_kernel[(K, triton.cdiv(C, GRADIENT_BLOCK))](
            logits_KC, logsumexp_K, labels_K, weights_K, C, logits_KC.stride(0), BLOCK=GRADIENT_BLOCK
        )


def _aligned(matrix: Tensor) -> Tensor:
    """The same matrix where the copy engine can read it: rows that begin on 16-byte borders. Zero columns add
    nothing."""
    elements = TMA_ALIGNMENT_BYTES // matrix.itemsize
    if matrix.stride(1) != 1 or matrix.stride(0) % elements or matrix.data_ptr() % TMA_ALIGNMENT_BYTES:
        return F.pad(matrix, (0, -matrix.shape[1] % elements)).contiguous()
    return matrix
