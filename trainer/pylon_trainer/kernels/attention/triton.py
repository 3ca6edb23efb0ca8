"""Attention of scattered rows on the device: a forward and two backward kernels, none of which knows K on the host.

The G query heads that share a key head stand side by side as "packed" rows p = k * G + g, so that a tile of them loads
each key once and spans few places. Rows rise, so a tile looks at one run of keys, of which only both ends need a mask:
first some keys that not every row of the tile may see, because of their documents, then those that all may, then those
that lie after some row. Read with rows and keys exchanged, the same holds for the gradient of the keys.

Every sum has one program and a fixed order, without atomics: the same input gives the same bits.

Statistics are those of a streamed softmax (Milakov and Gimelshein 2018, arXiv:1805.02867) in powers of two; gradients
follow Dao 2023, arXiv:2307.08691, section 3.1.2, with delta = sum(y * d_y).

Shapes: B sequences, T tokens, K chosen rows, L keys that receive gradient, H query heads, J key and value heads,
G = H / J, E width of a head; in a tile: M packed rows, N keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2.0**100))
"""Stands for "nothing seen yet": finite, so that differences to it are no NaN."""


@triton.jit
def _tile(ends_B, index, B, G: tl.constexpr, SIZE: tl.constexpr, B_PADDED: tl.constexpr):
    """Sequence, first packed row and end of the sequence's packed rows of a tile; past the last tile start >= end."""
    b_B = tl.arange(0, B_PADDED)
    end_B = tl.load(ends_B + b_B, mask=b_B < B, other=0)
    begin_B = tl.load(ends_B + b_B - 1, mask=(b_B > 0) & (b_B < B), other=0)
    tiles_B = ((end_B - begin_B) * G + SIZE - 1) // SIZE
    b = tl.sum((tl.cumsum(tiles_B, 0) <= index).to(tl.int32), 0)
    before = tl.sum(tl.where(b_B < b, tiles_B, 0), 0)
    begin = tl.sum(tl.where(b_B == b, begin_B, 0), 0)
    end = tl.sum(tl.where(b_B == b, end_B, 0), 0)
    return b, begin * G + (index - before) * SIZE, end * G


@triton.jit
def _packed(p, G: tl.constexpr, M: tl.constexpr):
    """Packed rows p to p + M: the row of the first, and for each its distance to that row and its head in the group.
    Without groups nothing but the first row depends on p, which keeps the addresses of a loop out of it."""
    r_M = p % G + tl.arange(0, M)
    return p // G, r_M // G, r_M % G


@triton.jit
def _load(base, offset_R, inside_R, MASKED: tl.constexpr, E: tl.constexpr, E_PADDED: tl.constexpr):
    """R x E_PADDED; zero outside when MASKED, and always past E."""
    e_E = tl.arange(0, E_PADDED)
    at_RE = base + offset_R[:, None] + e_E[None, :]
    if MASKED:
        return tl.load(at_RE, mask=inside_R[:, None] & (e_E < E)[None, :], other=0.0)
    if E < E_PADDED:
        return tl.load(at_RE, mask=(e_E < E)[None, :], other=0.0)
    return tl.load(at_RE)


@triton.jit
def _store(base, offset_R, inside_R, x_RE, E: tl.constexpr, E_PADDED: tl.constexpr):
    e_E = tl.arange(0, E_PADDED)
    at_RE = base + offset_R[:, None] + e_E[None, :]
    tl.store(at_RE, x_RE.to(base.dtype.element_ty), mask=inside_R[:, None] & (e_E < E)[None, :])


@triton.jit
def _sees(place, first, key, WINDOWED: tl.constexpr):
    """Whether a row at a place, which sees keys from the first, sees a key; broadcast."""
    return (key <= place) & (key >= first) if WINDOWED else key <= place


@triton.jit
def _keys_of_tile(
    rows_K, first_K, p, p_end, origin,
    WINDOWED: tl.constexpr, G: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The places that packed rows p to p + M look at, as three runs: where they start and where they stop. All rows see
    all of the second, which is whole tiles; without windows the first is empty."""
    k, k_last = p // G, (tl.minimum(p + M, p_end) - 1) // G
    start = tl.load(first_K + k) - origin
    full_start = start
    if WINDOWED:
        full_start += (tl.load(first_K + k_last) - origin - start + N - 1) // N * N
    full_stop = start + (tl.load(rows_K + k) - origin + 1 - start) // N * N
    stop = tl.load(rows_K + k_last) - origin + 1
    return (start, full_start, tl.maximum(full_start, full_stop)), (full_start, full_stop, stop)


@triton.jit
def forward_kernel(
    q_HKE, k_BJTE, v_BJTE, rows_K, first_K, ends_B, y_KHE, logsumexp_KH, B, T, log2_scale,
    stride_qh, stride_qk, stride_kb, stride_kj, stride_kt, stride_vb, stride_vj, stride_vt,
    WINDOWED: tl.constexpr, G: tl.constexpr, E: tl.constexpr, E_PADDED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, B_PADDED: tl.constexpr,
):  # fmt: skip
    # Late tiles see the most keys: they go first, so that no long one is left at the end.
    b, p, p_end = _tile(ends_B, tl.num_programs(0) - 1 - tl.program_id(0), B, G, M, B_PADDED)
    if p >= p_end:
        return
    j, H, origin = tl.program_id(1).to(tl.int64), tl.num_programs(1) * G, b * T
    p_M, n_N = p + tl.arange(0, M), tl.arange(0, N)
    inside_M, k_M, h_M = p_M < p_end, p_M // G, j * G + p_M % G
    kh_M = k_M.to(tl.int64) * H + h_M
    place_M1 = (tl.load(rows_K + k_M, mask=inside_M, other=0) - origin)[:, None]
    first_M1 = (tl.load(first_K + k_M, mask=inside_M, other=0) - origin)[:, None]
    q_ME = _load(q_HKE, k_M.to(tl.int64) * stride_qk + h_M * stride_qh, inside_M, True, E, E_PADDED)

    y_ME = tl.zeros([M, E_PADDED], tl.float32)
    m_M = tl.full([M], LOWEST, tl.float32)
    s_M = tl.zeros([M], tl.float32)
    starts, stops = _keys_of_tile(rows_K, first_K, p, p_end, origin, WINDOWED, G, M, N)
    for run in tl.static_range(0 if WINDOWED else 1, 3):
        k_NE = k_BJTE + b.to(tl.int64) * stride_kb + j * stride_kj + starts[run].to(tl.int64) * stride_kt
        v_NE = v_BJTE + b.to(tl.int64) * stride_vb + j * stride_vj + starts[run].to(tl.int64) * stride_vt
        for n in range(starts[run], stops[run], N):
            key_NE = _load(k_NE, n_N * stride_kt, n + n_N < stops[2], run != 1, E, E_PADDED)
            x_MN = tl.dot(q_ME, key_NE.T, input_precision="tf32x3")
            if run != 1:
                x_MN = tl.where(_sees(place_M1, first_M1, (n + n_N)[None, :], WINDOWED), x_MN, float("-inf"))
            new_m_M = tl.maximum(m_M, tl.max(x_MN, 1) * log2_scale)
            p_MN = tl.exp2(x_MN * log2_scale - new_m_M[:, None])
            factor_M = tl.exp2(m_M - new_m_M)
            s_M = s_M * factor_M + tl.sum(p_MN, 1)
            value_NE = _load(v_NE, n_N * stride_vt, n + n_N < stops[2], run != 1, E, E_PADDED)
            y_ME = tl.dot(p_MN.to(value_NE.dtype), value_NE, y_ME * factor_M[:, None], input_precision="tf32x3")
            m_M = new_m_M
            k_NE += N * stride_kt
            v_NE += N * stride_vt

    _store(y_KHE, kh_M * E, inside_M, y_ME / s_M[:, None], E, E_PADDED)
    tl.store(logsumexp_KH + kh_M, m_M + tl.log2(s_M), mask=inside_M)


@triton.jit
def d_queries_kernel(
    d_y_KHE, q_HKE, k_BJTE, v_BJTE, y_KHE, logsumexp_KH, rows_K, first_K, ends_B, d_q_KHE, delta_KH,
    B, T, scale, log2_scale, stride_qh, stride_qk, stride_kb, stride_kj, stride_kt, stride_vb, stride_vj, stride_vt,
    WINDOWED: tl.constexpr, G: tl.constexpr, E: tl.constexpr, E_PADDED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, B_PADDED: tl.constexpr,
):  # fmt: skip
    b, p, p_end = _tile(ends_B, tl.num_programs(0) - 1 - tl.program_id(0), B, G, M, B_PADDED)
    if p >= p_end:
        return
    j, H, origin = tl.program_id(1).to(tl.int64), tl.num_programs(1) * G, b * T
    p_M, n_N = p + tl.arange(0, M), tl.arange(0, N)
    inside_M, k_M, h_M = p_M < p_end, p_M // G, j * G + p_M % G
    kh_M = k_M.to(tl.int64) * H + h_M
    place_M1 = (tl.load(rows_K + k_M, mask=inside_M, other=0) - origin)[:, None]
    first_M1 = (tl.load(first_K + k_M, mask=inside_M, other=0) - origin)[:, None]
    q_ME = _load(q_HKE, k_M.to(tl.int64) * stride_qk + h_M * stride_qh, inside_M, True, E, E_PADDED)
    d_y_ME = _load(d_y_KHE, kh_M * E, inside_M, True, E, E_PADDED)
    y_ME = _load(y_KHE, kh_M * E, inside_M, True, E, E_PADDED)
    delta_M = tl.sum(y_ME.to(tl.float32) * d_y_ME.to(tl.float32), 1)
    tl.store(delta_KH + kh_M, delta_M, mask=inside_M)
    logsumexp_M = tl.load(logsumexp_KH + kh_M, mask=inside_M, other=0.0)

    d_q_ME = tl.zeros([M, E_PADDED], tl.float32)
    starts, stops = _keys_of_tile(rows_K, first_K, p, p_end, origin, WINDOWED, G, M, N)
    for run in tl.static_range(0 if WINDOWED else 1, 3):
        k_NE = k_BJTE + b.to(tl.int64) * stride_kb + j * stride_kj + starts[run].to(tl.int64) * stride_kt
        v_NE = v_BJTE + b.to(tl.int64) * stride_vb + j * stride_vj + starts[run].to(tl.int64) * stride_vt
        for n in range(starts[run], stops[run], N):
            key_NE = _load(k_NE, n_N * stride_kt, n + n_N < stops[2], run != 1, E, E_PADDED)
            value_NE = _load(v_NE, n_N * stride_vt, n + n_N < stops[2], run != 1, E, E_PADDED)
            x_MN = tl.dot(q_ME, key_NE.T, input_precision="tf32x3")
            p_MN = tl.exp2(x_MN * log2_scale - logsumexp_M[:, None])
            if run != 1:
                p_MN = tl.where(_sees(place_M1, first_M1, (n + n_N)[None, :], WINDOWED), p_MN, 0.0)
            d_p_MN = tl.dot(d_y_ME, value_NE.T, input_precision="tf32x3")
            d_x_MN = p_MN * (d_p_MN - delta_M[:, None])
            d_q_ME = tl.dot(d_x_MN.to(key_NE.dtype), key_NE, d_q_ME, input_precision="tf32x3")
            k_NE += N * stride_kt
            v_NE += N * stride_vt
    _store(d_q_KHE, kh_M * E, inside_M, d_q_ME * scale, E, E_PADDED)


@triton.jit
def d_keys_kernel(
    d_y_KHE, q_HKE, k_BJTE, v_BJTE, logsumexp_KH, delta_KH, rows_K, first_K, keys_L, from_L, until_L, key_ends_B,
    d_k_LJE, d_v_LJE, B, T, scale, log2_scale,
    stride_qh, stride_qk, stride_kb, stride_kj, stride_kt, stride_vb, stride_vj, stride_vt,
    WINDOWED: tl.constexpr, G: tl.constexpr, E: tl.constexpr, E_PADDED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, B_PADDED: tl.constexpr,
):  # fmt: skip
    # Early keys are seen by the most rows: they go first.
    b, first, end = _tile(key_ends_B, tl.program_id(0), B, 1, N, B_PADDED)
    if first >= end:
        return
    last = tl.minimum(first + N, end) - 1
    j, J, H = tl.program_id(1).to(tl.int64), tl.num_programs(1), tl.num_programs(1) * G
    l_N = first + tl.arange(0, N)
    inside_N = l_N < end
    place_N = tl.load(keys_L + l_N, mask=inside_N, other=0)
    t_N = (place_N - b * T).to(tl.int64)
    k_NE = _load(k_BJTE + b.to(tl.int64) * stride_kb + j * stride_kj, t_N * stride_kt, inside_N, True, E, E_PADDED)
    v_NE = _load(v_BJTE + b.to(tl.int64) * stride_vb + j * stride_vj, t_N * stride_vt, inside_N, True, E, E_PADDED)

    # The packed rows that see some of the keys, as three runs. All rows of the second see all keys.
    start, stop = tl.load(from_L + first) * G, tl.load(until_L + last) * G
    full_start = start + (tl.load(from_L + last) * G - start + M - 1) // M * M
    full_stop = start + (tl.load(until_L + first) * G - start) // M * M
    starts, stops = (start, full_start, tl.maximum(full_start, full_stop)), (full_start, full_stop, stop)
    d_k_NE = tl.zeros([N, E_PADDED], tl.float32)
    d_v_NE = tl.zeros([N, E_PADDED], tl.float32)
    for run in tl.static_range(3):
        for p in range(starts[run], stops[run], M):
            k, after_M, g_M = _packed(p, G, M)
            inside_M = p + tl.arange(0, M) < stop
            q_at = q_HKE + tl.cast(k, tl.int64) * stride_qk + j * G * stride_qh
            q_ME = _load(q_at, after_M * stride_qk + g_M * stride_qh, inside_M, run != 1, E, E_PADDED)
            kh, kh_M = tl.cast(k, tl.int64) * H + j * G, after_M * H + g_M
            d_y_ME = _load(d_y_KHE + kh * E, kh_M * E, inside_M, run != 1, E, E_PADDED)
            if run != 1:
                logsumexp_1M = tl.load(logsumexp_KH + kh + kh_M, mask=inside_M, other=0.0)[None, :]
                delta_1M = tl.load(delta_KH + kh + kh_M, mask=inside_M, other=0.0)[None, :]
            else:
                logsumexp_1M = tl.load(logsumexp_KH + kh + kh_M)[None, :]
                delta_1M = tl.load(delta_KH + kh + kh_M)[None, :]
            x_NM = tl.dot(k_NE, q_ME.T, input_precision="tf32x3")
            p_NM = tl.exp2(x_NM * log2_scale - logsumexp_1M)
            if run != 1:
                # A row outside sees places up to -1: none.
                place_1M = tl.load(rows_K + k + after_M, mask=inside_M, other=-1)[None, :]
                first_1M = tl.load(first_K + k + after_M, mask=inside_M, other=0)[None, :]
                p_NM = tl.where(_sees(place_1M, first_1M, place_N[:, None], WINDOWED), p_NM, 0.0)
            d_v_NE = tl.dot(p_NM.to(d_y_ME.dtype), d_y_ME, d_v_NE, input_precision="tf32x3")
            d_p_NM = tl.dot(v_NE, d_y_ME.T, input_precision="tf32x3")
            d_x_NM = p_NM * (d_p_NM - delta_1M)
            d_k_NE = tl.dot(d_x_NM.to(q_ME.dtype), q_ME, d_k_NE, input_precision="tf32x3")
    lj_N = l_N.to(tl.int64) * J + j
    _store(d_k_LJE, lj_N * E, inside_N, d_k_NE * scale, E, E_PADDED)
    _store(d_v_LJE, lj_N * E, inside_N, d_v_NE, E, E_PADDED)
