"""Scores of rows of logits in one pass over the vocabulary.

Each lane keeps the running statistics of the columns that it has seen; lanes meet once, at the end of the row. That
leaves ten or eleven instructions per logit, few enough for the pass to run near the speed of memory. The order of every
sum is fixed: the same input gives the same bits.

Running statistics of columns x (Milakov and Gimelshein 2018, arXiv:1805.02867, carried on to entropy and gradient
norm), with d = (x - m1) log2(e), which is small where it counts, so that large logits do not cancel:

    m1, m2   largest and second largest        s = sum 2^d        t = sum d 2^d        q = sum 4^d

Shapes: N rows, V vocabulary, and in a tile: L lanes, U loads per lane, E elements of one 16-byte load, P pairs. Lanes
come first, so that the compiler gives each to one thread and sums over U and E need no exchange between threads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pylon_trainer.kernels.score.reference import Scores
from pylon_trainer.step import IGNORED

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-(2.0**100))
"""Stands for "nothing seen yet". Finite, so that differences to it are no NaN, and a power of two, so that its product
with LOG2_E has no rounding for a fused multiply-add to expose. Logits below it are reported as not finite."""

LANES, CHUNKS, WARPS = 64, 4, 2
LOAD_BYTES = 16


@triton.jit
def merge_top_two(first_a, second_a, first_b, second_b):
    """The two largest of two pairs, each already in order."""
    return tl.maximum(first_a, first_b), tl.maximum(tl.minimum(first_a, first_b), tl.maximum(second_a, second_b))


@triton.jit
def rescale(m1, s, t, q, new_m1):
    """The sums of columns seen relative to m1, made relative to new_m1 >= m1."""
    shift = (m1 - new_m1) * LOG2_E
    factor = tl.exp2(shift)
    return s * factor, (t + shift * s) * factor, q * factor * factor


@triton.jit
def finish(m1, m2, s, t, q, label_logit):
    """Scores of rows from their statistics: entropy, margin, loss, confidence, logsumexp, gradient norm."""
    log_s = tl.log2(s) * LN_2
    entropy = log_s - t / s * LN_2
    confidence = 1.0 / s
    margin = confidence - tl.exp2((m2 - m1) * LOG2_E) / s
    loss = tl.maximum(log_s + (m1 - label_logit), 0.0)
    p = tl.exp2(-loss * LOG2_E)
    # |p - onehot|^2 = (1 - p_y)^2 + sum over the others of p_j^2. The last sum is a difference that cancels when the
    # label holds nearly all of the mass; it lies between 0 and (1 - p_y)^2, whatever rounding says. Below 2^-6 the
    # series of 1 - e^-loss is exact.
    miss = tl.where(loss < 0.015625, loss * (1.0 - loss * (0.5 - loss * (1.0 / 6.0))), 1.0 - p)
    others = tl.minimum(tl.maximum(q / (s * s) - p * p, 0.0), miss * miss)
    return entropy, margin, loss, confidence, m1 + log_s, tl.sqrt(miss * miss + others)


@triton.jit
def store_scores(
    scores_6N, nonfinite_rows, n, N, valid, labelled, entropy, margin, loss, confidence, logsumexp, gradient_norm
):  # fmt: skip
    """Write the scores of rows n, 0 where there is no label, and count the labelled rows that are not finite."""
    tl.store(scores_6N + n, tl.where(labelled, entropy, 0.0), mask=valid)
    tl.store(scores_6N + N + n, tl.where(labelled, margin, 0.0), mask=valid)
    tl.store(scores_6N + 2 * N + n, tl.where(labelled, loss, 0.0), mask=valid)
    tl.store(scores_6N + 3 * N + n, tl.where(labelled, confidence, 0.0), mask=valid)
    tl.store(scores_6N + 4 * N + n, tl.where(labelled, logsumexp, 0.0), mask=valid)
    tl.store(scores_6N + 5 * N + n, tl.where(labelled, gradient_norm, 0.0), mask=valid)
    # One NaN or infinity in a row makes s or t no number, and with it the entropy.
    finite = tl.abs(entropy) < float("inf")
    tl.atomic_add(nonfinite_rows + n * 0, 1, mask=valid & labelled & (finite == 0))


@triton.jit
def _fold(x_LUE, m1_L, m2_L, s_L, t_L, q_L):
    """Take a tile of logits into the lanes' statistics."""
    # The two largest, from ordered pairs of neighbours: fewer comparisons than from single logits.
    even_LP, odd_LP = tl.split(tl.reshape(x_LUE, [x_LUE.shape[0], x_LUE.shape[1] * x_LUE.shape[2] // 2, 2]))
    first_L, second_L = tl.reduce((tl.maximum(even_LP, odd_LP), tl.minimum(even_LP, odd_LP)), 1, merge_top_two)
    new_m1_L, m2_L = merge_top_two(m1_L, m2_L, first_L, second_L)
    s_L, t_L, q_L = rescale(m1_L, s_L, t_L, q_L, new_m1_L)
    d_LUE = x_LUE * LOG2_E - (new_m1_L * LOG2_E)[:, None, None]
    e_LUE = tl.exp2(d_LUE)
    s_L += tl.sum(tl.sum(e_LUE, 1), 1)
    t_L += tl.sum(tl.sum(d_LUE * e_LUE, 1), 1)
    q_L += tl.sum(tl.sum(e_LUE * e_LUE, 1), 1)
    return new_m1_L, m2_L, s_L, t_L, q_L


@triton.jit
def _load_edge(tile_LUE, column_LUE, v, first, end):
    """The tile at v of a row that holds columns first to end. Whole 16-byte pieces are loaded, strangers blanked."""
    E: tl.constexpr = column_LUE.shape[2]
    column_LUE += v
    x_LUE = tl.load(tile_LUE + v, mask=column_LUE < (end + E - 1) // E * E, other=0.0).to(tl.float32)
    return tl.where((column_LUE >= first) & (column_LUE < end), x_LUE, LOWEST)


@triton.jit
def _score_kernel(
    logits, labels_N, scores_6N, nonfinite_rows, N, V, offset, stride_N,
    IGNORED: tl.constexpr, U: tl.constexpr, L: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    label = tl.load(labels_N + n)
    if label == IGNORED:
        for i in tl.static_range(6):
            tl.store(scores_6N + i * N + n, 0.0)
        return

    # A row may begin anywhere, loads want 16-byte borders: start at the border below and blank what belongs to the
    # neighbours.
    begin = offset + n.to(tl.int64) * stride_N
    start = begin // E * E
    first = (begin - start).to(tl.int32)
    end = first + V
    lane_load_LU = tl.arange(0, U)[None, :] * L + tl.arange(0, L)[:, None]
    column_LUE = lane_load_LU[:, :, None] * E + tl.arange(0, E)[None, None, :]
    tile_LUE = logits + start + column_LUE

    m1_L = tl.full([L], LOWEST, tl.float32)
    m2_L = tl.full([L], LOWEST, tl.float32)
    s_L = tl.zeros([L], tl.float32)
    t_L = tl.zeros([L], tl.float32)
    q_L = tl.zeros([L], tl.float32)

    tile = U * L * E
    full_end = end // tile * tile
    x_LUE = _load_edge(tile_LUE, column_LUE, 0, first, end)
    m1_L, m2_L, s_L, t_L, q_L = _fold(x_LUE, m1_L, m2_L, s_L, t_L, q_L)
    for v in range(tile, full_end, tile):
        x_LUE = tl.load(tile_LUE + v).to(tl.float32)
        m1_L, m2_L, s_L, t_L, q_L = _fold(x_LUE, m1_L, m2_L, s_L, t_L, q_L)
    if (full_end > 0) & (full_end < end):
        x_LUE = _load_edge(tile_LUE, column_LUE, full_end, first, end)
        m1_L, m2_L, s_L, t_L, q_L = _fold(x_LUE, m1_L, m2_L, s_L, t_L, q_L)

    m1, m2 = tl.reduce((m1_L, m2_L), 0, merge_top_two)
    s_L, t_L, q_L = rescale(m1_L, s_L, t_L, q_L, m1)
    label_logit = tl.load(logits + begin + label).to(tl.float32)
    entropy, margin, loss, confidence, logsumexp, gradient_norm = finish(
        m1, m2, tl.sum(s_L, 0), tl.sum(t_L, 0), tl.sum(q_L, 0), label_logit
    )
    row = n < N
    store_scores(scores_6N, nonfinite_rows, n, N, row, row, entropy, margin, loss, confidence, logsumexp, gradient_norm)


def score(logits_NV: Tensor, labels_N: Tensor) -> Scores:
    """As `reference.score`, in one pass."""
    (N, V), (stride_N, stride_V) = logits_NV.shape, logits_NV.stride()
    if stride_V != 1 and V > 1:
        raise ValueError(f"score: the vocabulary has stride {stride_V}; call .contiguous() on the logits first")
    scores_6N = logits_NV.new_empty((6, N), dtype=torch.float32)
    nonfinite_rows = logits_NV.new_zeros((), dtype=torch.int32)
    if N:
        elements = LOAD_BYTES // logits_NV.itemsize
        offset = logits_NV.storage_offset() % elements
        aligned = logits_NV.as_strided((1,), (1,), logits_NV.storage_offset() - offset)
        _score_kernel[(N,)](
            aligned, labels_N.contiguous(), scores_6N, nonfinite_rows, N, V, offset, stride_N,
            IGNORED=IGNORED, U=CHUNKS, L=LANES, E=elements, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return Scores.unpack(scores_6N, nonfinite_rows)
