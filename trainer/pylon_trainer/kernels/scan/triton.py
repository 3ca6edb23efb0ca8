"""The state-space dual on the device: sums of decays, a sweep over the states of chunks, outputs, and gradients.

Tokens go by chunks of Q. `sweep_kernel` walks over the chunks of a head with the state in registers, and leaves the one
that enters each chunk; run backwards over the gradient of y, it leaves the gradient of the one that leaves each chunk.
With both at hand chunks know all that they need of each other, so the other kernels take a chunk per program. The heads
of a group share `write` and `read`: a program takes one head after the other, loads both once, multiplies them once,
and sums what goes back to them in registers. `maps_kernel`, which gives these two their gradients, is apart from
`gradients_kernel` because both together need twice the registers that there are.

Within a chunk, with s the running sum of logarithms of decays, and everything else as in models/resonate/scan.py:

    y_i = sum over j <= i of (read_i . write_j) exp(s_i - s_j) step_j values_j  +  exp(s_i) read_i state

so d y . y and d values . values tell what s_i and s_j receive. What a token does to itself depends on no decay; it is
left out of both sums, as their difference would drown the others' gradients in its rounding.

Every sum has one program and a fixed order, without atomics: the same input gives the same bits. Products run in the
type of the values, float32 ones in three parts of tf32; decays, sums and states in registers are float32.

Shapes: B sequences, T tokens, C chunks of Q tokens, G groups of J heads, H = G * J, N size of a state, P width of a
head, TILES tiles of columns that a head's P are cut into. V counts the tiles of all heads of a group: every tile is a
scan of its own, with the decays of its head.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(base, row_R, inside_R, stride, column_E, E: tl.constexpr):
    """R x E of rows that are `stride` apart; zero outside."""
    at_RE = base + row_R[:, None] * stride + column_E[None, :]
    return tl.load(at_RE, mask=inside_R[:, None] & (column_E < E)[None, :], other=0.0)


@triton.jit
def _store(base, row_R, inside_R, stride, column_E, x_RE, E: tl.constexpr):
    at_RE = base + row_R[:, None] * stride + column_E[None, :]
    tl.store(at_RE, x_RE.to(base.dtype.element_ty), mask=inside_R[:, None] & (column_E < E)[None, :])


@triton.jit
def _sums_of(steps_TH, sums_TH, t_Q, last, T, H: tl.constexpr):
    """Steps and sums of a chunk's tokens, and the sum at its last; zero past the sequence."""
    inside_Q = t_Q < T
    steps_Q = tl.load(steps_TH + t_Q * H, mask=inside_Q, other=0.0)
    sums_Q = tl.load(sums_TH + t_Q * H, mask=inside_Q, other=0.0)
    return steps_Q, sums_Q, tl.load(sums_TH + last * H)


@triton.jit
def _weights(steps_Q, sums_Q, total, REVERSE: tl.constexpr):
    """With which tokens add to the state that leaves their chunk, or with REVERSE read the one that enters it."""
    return tl.exp2(sums_Q) if REVERSE else tl.exp2(total - sums_Q) * steps_Q


@triton.jit
def sums_kernel(
    x_BTH, sums_BTH, T, factor, REVERSE: tl.constexpr, H: tl.constexpr, H_PADDED: tl.constexpr, Q: tl.constexpr
):
    """factor * sums of x over the tokens of a chunk up to each, or with REVERSE from each on."""
    c, b = tl.program_id(0), tl.program_id(1)
    t_Q, h_H = c * Q + tl.arange(0, Q), tl.arange(0, H_PADDED)
    origin = b.to(tl.int64) * T * H
    x_QH = _load(x_BTH + origin, t_Q, t_Q < T, H, h_H, H)
    _store(sums_BTH + origin, t_Q, t_Q < T, H, h_H, tl.cumsum(x_QH, 0, reverse=REVERSE) * factor, H)


@triton.jit
def sweep_kernel(
    x_BTHP, maps_BTGN, steps_BTH, sums_BTH, first_BHNP, states_BCHNP, last_BHNP, T,
    stride_xb, stride_xt, stride_mb, stride_mt,
    REVERSE: tl.constexpr, HAS_FIRST: tl.constexpr, H: tl.constexpr, J: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    TILES: tl.constexpr, Q: tl.constexpr, N_TILE: tl.constexpr, P_TILE: tl.constexpr,
):  # fmt: skip
    """The state that enters each chunk from the left, and the one after the last. x: values, maps: write.

    REVERSE: the gradient of the state that leaves each chunk, and of the one before the first. x: gradient of y, maps:
    read."""
    h, b, C = tl.program_id(0) // TILES, tl.program_id(1).to(tl.int64), tl.cdiv(T, Q)
    p_P = tl.program_id(0) % TILES * P_TILE + tl.arange(0, P_TILE)
    n_N = tl.program_id(2) * N_TILE + tl.arange(0, N_TILE)
    is_real_N = n_N < N
    x_TP, maps_TN = x_BTHP + b * stride_xb + h * P, maps_BTGN + b * stride_mb + h // J * N
    steps_TH, sums_TH = steps_BTH + b * T * H + h, sums_BTH + b * T * H + h
    end_NP = (b * H + h) * N * P
    state_NP = tl.zeros([N_TILE, P_TILE], tl.float32)
    if HAS_FIRST:
        state_NP = _load(first_BHNP + end_NP, n_N, is_real_N, P, p_P, P).to(tl.float32)
    for turn in range(0, C):
        c = C - 1 - turn if REVERSE else turn
        _store(states_BCHNP + ((b * C + c) * H + h) * N * P, n_N, is_real_N, P, p_P, state_NP, P)
        t_Q = c * Q + tl.arange(0, Q)
        steps_Q, sums_Q, total = _sums_of(steps_TH, sums_TH, t_Q, tl.minimum(c * Q + Q, T) - 1, T, H)
        start = tl.cast(c, tl.int64) * Q
        q_Q = tl.arange(0, Q)
        x_QP = _load(x_TP + start * stride_xt, q_Q, t_Q < T, stride_xt, p_P, P)
        at_NQ = maps_TN + start * stride_mt + n_N[:, None] + q_Q[None, :] * stride_mt
        maps_NQ = tl.load(at_NQ, mask=is_real_N[:, None] & (t_Q < T)[None, :], other=0.0)
        weighted_NQ = (maps_NQ * _weights(steps_Q, sums_Q, total, REVERSE)[None, :]).to(x_QP.dtype)
        state_NP = tl.dot(weighted_NQ, x_QP, state_NP * tl.exp2(total), input_precision="tf32x3")
    _store(last_BHNP + end_NP, n_N, is_real_N, P, p_P, state_NP, P)


@triton.jit
def outputs_kernel(
    values_BTHP, write_BTGN, read_BTGN, steps_BTH, sums_BTH, states_BCHNP, y_BTHP, T,
    stride_vb, stride_vt, stride_wb, stride_wt, stride_rb, stride_rt,
    H: tl.constexpr, J: tl.constexpr, N: tl.constexpr, P: tl.constexpr, TILES: tl.constexpr,
    Q: tl.constexpr, N_PADDED: tl.constexpr, P_TILE: tl.constexpr, V_PROGRAM: tl.constexpr,
):  # fmt: skip
    """y of one chunk and V_PROGRAM tiles of a group's heads."""
    c, b, C = tl.program_id(1), (tl.program_id(2) // (H // J)).to(tl.int64), tl.num_programs(1)
    g, first = tl.program_id(2) % (H // J), tl.program_id(0) * V_PROGRAM
    q_Q, n_N, start = tl.arange(0, Q), tl.arange(0, N_PADDED), c.to(tl.int64) * Q
    t_Q, last = c * Q + q_Q, tl.minimum(c * Q + Q, T) - 1
    inside_Q = t_Q < T
    write_QN = _load(write_BTGN + b * stride_wb + start * stride_wt + g * N, q_Q, inside_Q, stride_wt, n_N, N)
    read_QN = _load(read_BTGN + b * stride_rb + start * stride_rt + g * N, q_Q, inside_Q, stride_rt, n_N, N)
    scores_QQ = tl.dot(read_QN, write_QN.T, input_precision="tf32x3")
    sees_QQ = (q_Q[:, None] >= q_Q[None, :]) & inside_Q[:, None]
    for v in range(first, tl.minimum(first + V_PROGRAM, J * TILES)):
        h, p_P = g * J + v // TILES, v % TILES * P_TILE + tl.arange(0, P_TILE)
        steps_Q, sums_Q, _ = _sums_of(steps_BTH + b * T * H + h, sums_BTH + b * T * H + h, t_Q, last, T, H)
        values_QP = _load(values_BTHP + b * stride_vb + start * stride_vt + h * P, q_Q, inside_Q, stride_vt, p_P, P)
        state_NP = _load(states_BCHNP + ((b * C + c) * H + h) * N * P, n_N, n_N < N, P, p_P, P)
        decays_QQ = tl.exp2(tl.where(sees_QQ, sums_Q[:, None] - sums_Q[None, :], float("-inf")))
        weights_QQ = (scores_QQ * decays_QQ * steps_Q[None, :]).to(values_QP.dtype)
        y_QP = tl.dot(read_QN, state_NP, input_precision="tf32x3") * tl.exp2(sums_Q)[:, None]
        y_QP = tl.dot(weights_QQ, values_QP, y_QP, input_precision="tf32x3")
        _store(y_BTHP + ((b * T + start) * H + h) * P, q_Q, inside_Q, H * P, p_P, y_QP, P)


@triton.jit
def gradients_kernel(
    d_y_BTHP, values_BTHP, write_BTGN, read_BTGN, steps_BTH, sums_BTH, states_BCHNP, d_states_BCHNP,
    d_values_BTHP, d_steps_BTHK, d_sums_BTHK, d_scores_SBCGQQ, T, B,
    stride_db, stride_dt, stride_vb, stride_vt, stride_wb, stride_wt, stride_rb, stride_rt,
    H: tl.constexpr, J: tl.constexpr, N: tl.constexpr, P: tl.constexpr, TILES: tl.constexpr,
    Q: tl.constexpr, N_PADDED: tl.constexpr, P_TILE: tl.constexpr, V_PROGRAM: tl.constexpr,
):  # fmt: skip
    """Gradients of values, steps and sums of one chunk and V_PROGRAM tiles of a group's heads, and those tiles' share
    of the gradient of its scores write_j . read_i. Matrices lie with j in rows, i in columns."""
    c, b, C = tl.program_id(1), (tl.program_id(2) // (H // J)).to(tl.int64), tl.num_programs(1)
    g, split, G = tl.program_id(2) % (H // J), tl.program_id(0), H // J
    q_Q, n_N, start = tl.arange(0, Q), tl.arange(0, N_PADDED), c.to(tl.int64) * Q
    t_Q, last = c * Q + q_Q, tl.minimum(c * Q + Q, T) - 1
    inside_Q = t_Q < T
    write_QN = _load(write_BTGN + b * stride_wb + start * stride_wt + g * N, q_Q, inside_Q, stride_wt, n_N, N)
    read_QN = _load(read_BTGN + b * stride_rb + start * stride_rt + g * N, q_Q, inside_Q, stride_rt, n_N, N)
    # Masks stay out of the loop, where each would take as many registers as a matrix: what is hidden has scores of 0,
    # as has what a token does to itself, for which a vector stands; gradients of scores are masked at the end.
    scores_QQ = tl.dot(write_QN, read_QN.T, input_precision="tf32x3")
    scores_QQ = tl.where(q_Q[:, None] < q_Q[None, :], scores_QQ, 0.0)
    own_scores_Q = tl.sum(write_QN.to(tl.float32) * read_QN, 1)
    d_scores_QQ = tl.zeros([Q, Q], tl.float32)
    first = split * V_PROGRAM
    for v in range(first, tl.minimum(first + V_PROGRAM, J * TILES)):
        h, p_P = g * J + v // TILES, v % TILES * P_TILE + tl.arange(0, P_TILE)
        steps_Q, sums_Q, total = _sums_of(steps_BTH + b * T * H + h, sums_BTH + b * T * H + h, t_Q, last, T, H)
        values_QP = _load(values_BTHP + b * stride_vb + start * stride_vt + h * P, q_Q, inside_Q, stride_vt, p_P, P)
        d_y_QP = _load(d_y_BTHP + b * stride_db + start * stride_dt + h * P, q_Q, inside_Q, stride_dt, p_P, P)
        origin = ((b * C + c) * H + h) * N * P
        state_NP = _load(states_BCHNP + origin, n_N, n_N < N, P, p_P, P)
        d_state_NP = _load(d_states_BCHNP + origin, n_N, n_N < N, P, p_P, P)

        # Within the chunk. Past the sequence d_y is 0.
        decays_QQ = tl.exp2(tl.minimum(sums_Q[None, :] - sums_Q[:, None], 0.0))
        d_given_QP = tl.dot((scores_QQ * decays_QQ).to(d_y_QP.dtype), d_y_QP, input_precision="tf32x3")
        d_given_QP += own_scores_Q[:, None] * d_y_QP
        d_weights_QQ = tl.dot(values_QP, d_y_QP.T, input_precision="tf32x3") * (decays_QQ * steps_Q[:, None])
        d_scores_QQ += d_weights_QQ
        shares_QQ = d_weights_QQ * scores_QQ
        d_sums_Q = tl.sum(shares_QQ, 0) - tl.sum(shares_QQ, 1)

        # What the tokens give to the state that leaves the chunk.
        left_QP = tl.dot(write_QN, d_state_NP, input_precision="tf32x3") * tl.exp2(total - sums_Q)[:, None]
        d_given_QP += left_QP
        left_Q = tl.sum(left_QP * values_QP, 1) * steps_Q
        passed = tl.sum(tl.sum(state_NP.to(tl.float32) * d_state_NP, 1), 0) * tl.exp2(total)

        # What they take of the one that enters it.
        taken_QP = tl.dot(read_QN, state_NP, input_precision="tf32x3")
        taken_Q = tl.sum(taken_QP * d_y_QP, 1) * tl.exp2(sums_Q)
        d_sums_Q += taken_Q - left_Q + tl.where(t_Q == last, tl.sum(left_Q, 0) + passed, 0.0)

        _store(
            d_values_BTHP + ((b * T + start) * H + h) * P, q_Q, inside_Q, H * P, p_P, d_given_QP * steps_Q[:, None], P
        )
        at_Q = ((b * T + t_Q) * H + h) * TILES + v % TILES
        tl.store(d_steps_BTHK + at_Q, tl.sum(d_given_QP * values_QP, 1), mask=inside_Q)
        tl.store(d_sums_BTHK + at_Q, d_sums_Q, mask=inside_Q)

    d_scores_QQ = tl.where(q_Q[:, None] <= q_Q[None, :], d_scores_QQ, 0.0)
    origin = (((split * B + b) * C + c) * G + g) * Q * Q
    _store(d_scores_SBCGQQ + origin, q_Q, q_Q < Q, Q, q_Q, d_scores_QQ, Q)


@triton.jit
def maps_kernel(
    x_BTHP, states_BCHNP, steps_BTH, sums_BTH, d_scores_SBCGQQ, others_BTGN, d_maps_BTGN, T, B, S,
    stride_xb, stride_xt, stride_ob, stride_ot,
    REVERSE: tl.constexpr, H: tl.constexpr, J: tl.constexpr, N: tl.constexpr, P: tl.constexpr, TILES: tl.constexpr,
    Q: tl.constexpr, N_TILE: tl.constexpr, P_TILE: tl.constexpr,
):  # fmt: skip
    """The gradient of `write` of one chunk. x: values, states: gradients of those that leave chunks, others: read.

    REVERSE: that of `read`. x: gradient of y, states: those that enter chunks, others: write."""
    c, b, C = tl.program_id(1), (tl.program_id(2) // (H // J)).to(tl.int64), tl.num_programs(1)
    g, G, start = tl.program_id(2) % (H // J), H // J, c.to(tl.int64) * Q
    q_Q, n_N = tl.arange(0, Q), tl.program_id(0) * N_TILE + tl.arange(0, N_TILE)
    t_Q, last = c * Q + q_Q, tl.minimum(c * Q + Q, T) - 1
    inside_Q = t_Q < T
    others_QN = _load(others_BTGN + b * stride_ob + start * stride_ot + g * N, q_Q, inside_Q, stride_ot, n_N, N)
    d_scores_QQ = tl.zeros([Q, Q], tl.float32)
    for s in range(0, S):
        scores_QQ = d_scores_SBCGQQ + (((s * B + b) * C + c) * G + g) * Q * Q
        at_QQ = q_Q[:, None] + q_Q[None, :] * Q if REVERSE else q_Q[:, None] * Q + q_Q[None, :]
        d_scores_QQ += tl.load(scores_QQ + at_QQ)
    d_maps_QN = tl.dot(d_scores_QQ.to(others_QN.dtype), others_QN, input_precision="tf32x3")
    for v in range(0, J * TILES):
        h, p_P = g * J + v // TILES, v % TILES * P_TILE + tl.arange(0, P_TILE)
        steps_Q, sums_Q, total = _sums_of(steps_BTH + b * T * H + h, sums_BTH + b * T * H + h, t_Q, last, T, H)
        x_QP = _load(x_BTHP + b * stride_xb + start * stride_xt + h * P, q_Q, inside_Q, stride_xt, p_P, P)
        state_NP = _load(states_BCHNP + ((b * C + c) * H + h) * N * P, n_N, n_N < N, P, p_P, P)
        weighted_QP = (x_QP * _weights(steps_Q, sums_Q, total, REVERSE)[:, None]).to(x_QP.dtype)
        d_maps_QN = tl.dot(weighted_QP, state_NP.T, d_maps_QN, input_precision="tf32x3")
    _store(d_maps_BTGN + ((b * T + start) * G + g) * N, q_Q, inside_Q, G * N, n_N, d_maps_QN, N)
