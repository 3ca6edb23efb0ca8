"""The state-space dual (Dao & Gu 2024, arXiv:2405.21060, section 6): one recurrence, written in three ways.

A head keeps a state of N x P numbers. Each token lets it decay, adds the outer product of its `write` vector and its
values, and reads it with its `read` vector:

    state = exp(step * pole) * state + write (step * values)^T        y = read^T state

`sequential_scan` is that, word for word, and `scan_token` one turn of it. `chunked_scan` computes the same as products
of matrices: within a chunk of tokens like attention with decays for a mask, between chunks by their states alone.

Poles are negative, so every decay is at most 1: decays are exponentials of sums of non-positive numbers, and what a
token must not see is masked before the exponential. The sums are differences of running sums; those are taken in
float64, or a short decay after a long one would have lost its digits. Products run in the values' own precision.

Memory on the way, none of which outlives the call when the caller computes it again (models/recompute.py): per token
H * Q numbers for the decayed scores and H * N * P / Q for the states. At Q = N = P both are as large as the values, so
the default chunk is as long as a head is wide. Compiled, they are in the values' precision; the decays, float32, are
never written. A long sequence goes by spans of SPAN_CHUNKS chunks, each from the state that the one before left.

Shapes: B sequences, T tokens, C chunks of Q tokens, H heads, P width of a head, G groups of J heads that share `write`
and `read`, N size of a state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SPAN_CHUNKS = 128
"""Chunks whose states are combined by one product of C x C decays, which grows as C^2."""


def chunked_scan(
    values_BTHP: Tensor,
    steps_BTH: Tensor,
    poles_H: Tensor,
    write_BTGN: Tensor,
    read_BTGN: Tensor,
    *,
    chunk_tokens: int,
    starts_BT: Tensor | None = None,
    state_BHNP: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y B x T x H x P in the values' type, and the state after the last token, float32.

    steps_BTH: float32, positive. poles_H: float32, negative. starts_BT: first place of each token's document, where
    the state begins at zero; None: the state runs on. state_BHNP: of the tokens before; None is zero. Any T.
    """

    def scan_span(state: Tensor | None, starts: Tensor | None, *parts: Tensor) -> tuple[Tensor, Tensor]:
        values, steps, write, read = parts
        return _scan_span(values, steps, poles_H, write, read, chunk_tokens, starts, state)

    return by_spans(scan_span, chunk_tokens, state_BHNP, starts_BT, values_BTHP, steps_BTH, write_BTGN, read_BTGN)


def by_spans(
    run: Callable[..., tuple[Tensor, Tensor]],
    chunk_tokens: int,
    state: Tensor | None,
    starts_BT: Tensor | None,
    *inputs_BT: Tensor,
) -> tuple[Tensor, Tensor]:
    """run(state, starts, *inputs) -> (outputs, state) on spans of SPAN_CHUNKS chunks, one after the other."""
    tokens, span = inputs_BT[0].shape[1], SPAN_CHUNKS * chunk_tokens
    if tokens <= span:  # without slices of everything, which mislead the compiler's partition of a checkpointed graph
        return run(state, starts_BT, *inputs_BT)
    outputs_BT = []
    for first in range(0, tokens, span):
        part = slice(first, first + span)
        starts = None if starts_BT is None else starts_BT[:, part] - first
        y_BT, state = run(state, starts, *(x_BT[:, part] for x_BT in inputs_BT))
        outputs_BT.append(y_BT)
    assert state is not None, "there is a span"
    return torch.cat(outputs_BT, 1), state


def _scan_span(
    values_BTHP: Tensor,
    steps_BTH: Tensor,
    poles_H: Tensor,
    write_BTGN: Tensor,
    read_BTGN: Tensor,
    chunk_tokens: int,
    starts_BT: Tensor | None,
    state_BHNP: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As chunked_scan; a start below 0 is that of a document whose state is at hand."""
    tokens, dtype = values_BTHP.shape[1], values_BTHP.dtype
    groups = write_BTGN.shape[2]
    length = min(chunk_tokens, tokens)
    padding = -tokens % length  # steps of 0 leave the state alone
    steps_BCQH = chunks_of(steps_BTH, length, padding)
    values_BCQHP = (chunks_of(values_BTHP, length, padding) * steps_BCQH[..., None]).to(dtype)
    write_BCGQN = chunks_of(write_BTGN, length, padding).transpose(2, 3)
    read_BCGQN = chunks_of(read_BTGN, length, padding).transpose(2, 3)
    # Logarithm of the decay from before the chunk to after each of its tokens.
    sums_BCHQ = (steps_BCQH * poles_H).cumsum(2, dtype=torch.float64).transpose(2, 3)
    total_BCH1 = sums_BCHQ[..., -1:]

    borders = Borders.of(starts_BT, tokens, length, values_BTHP.device)

    # Within chunks.
    decays_BCHQQ = decays(sums_BCHQ, borders.sees)
    scores_BCGQQ = read_BCGQN @ write_BCGQN.mT
    weights_BCHQQ = (scores_BCGQQ.unsqueeze(3) * decays_BCHQQ.unflatten(2, (groups, -1))).flatten(2, 3).to(dtype)
    near_BCQHP = (weights_BCHQQ @ values_BCQHP.transpose(2, 3)).transpose(2, 3)

    # What each chunk adds to the state, and the state that enters it.
    decays_BCQH = where(borders.remains_BCQ, (total_BCH1 - sums_BCHQ).float().exp().transpose(2, 3))
    left_BCQHP = (values_BCQHP * decays_BCQH[..., None]).to(dtype)
    left_BCGQF = left_BCQHP.unflatten(3, (groups, -1)).flatten(4).transpose(2, 3)  # F = J * P: all heads of a group
    added_BCGNF = write_BCGQN.mT @ left_BCGQF
    added_BCHNP = added_BCGNF.unflatten(4, (-1, values_BTHP.shape[3])).transpose(3, 4).flatten(2, 3)
    states_BCHNP, state_BHNP = carry(added_BCHNP, total_BCH1.squeeze(-1), borders.owners_BC, state_BHNP)

    # What the tokens read of it.
    states_BCGNF = states_BCHNP.unflatten(2, (groups, -1)).transpose(3, 4).flatten(4)
    far_BCQHP = (read_BCGQN @ states_BCGNF).transpose(2, 3).unflatten(4, (-1, values_BTHP.shape[3])).flatten(3, 4)
    decays_BCQH = where(borders.reached_BCQ, sums_BCHQ.float().exp().transpose(2, 3))
    y_BTHP = (near_BCQHP + far_BCQHP * decays_BCQH[..., None]).flatten(1, 2)[:, :tokens]
    return y_BTHP.to(dtype), state_BHNP


class Borders(NamedTuple):
    """What the starts of documents hide from whom, in chunks."""

    sees: Tensor
    """Q x Q, or B x C x 1 x Q x Q: which tokens of its chunk a token sees."""
    remains_BCQ: Tensor | None = None
    """Whether a token is remembered at the end of its chunk."""
    reached_BCQ: Tensor | None = None
    """Whether a token sees the state that enters its chunk."""
    owners_BC: Tensor | None = None
    """First place of the document that the chunk's last token belongs to; -1: before the first token."""

    @classmethod
    def of(cls, starts_BT: Tensor | None, tokens: int, length: int, device: torch.device) -> Borders:
        """starts_BT: as chunked_scan has it, below 0 where the document began before the first token."""
        places_Q = torch.arange(length, device=device)
        sees_QQ = places_Q[:, None] >= places_Q
        if starts_BT is None:
            return cls(sees_QQ)
        places_CQ = torch.arange(tokens + -tokens % length, device=device).unflatten(0, (-1, length))
        starts_BCQ = starts_BT[:, places_CQ.clamp_max(tokens - 1)]
        return cls(
            sees=(sees_QQ & (places_CQ[:, None] >= starts_BCQ[..., None])).unsqueeze(2),
            remains_BCQ=places_CQ >= starts_BCQ[..., -1:],
            reached_BCQ=starts_BCQ < places_CQ[:, :1],
            owners_BC=starts_BCQ[..., -1].clamp_min(-1),
        )


def carry(
    added_BCHNP: Tensor, decays_BCH: Tensor, owners_BC: Tensor | None, state_BHNP: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The state before each chunk, in the type of `added`, and the one after the last, float32.

    decays_BCH: logarithms over whole chunks, float64. owners_BC: as Borders has it. state_BHNP: None is zero.
    """
    chunks = decays_BCH.shape[1]
    if state_BHNP is None:
        state_BHNP = torch.zeros_like(added_BCHNP[:, 0])
    # Item 0 is the state at hand, item i + 1 what chunk i adds; state i is a sum over the items up to i.
    items_BHIF = torch.cat((state_BHNP.to(added_BCHNP.dtype).unsqueeze(1), added_BCHNP), 1).flatten(3).transpose(1, 2)
    sums_BHI = F.pad(decays_BCH, (0, 0, 1, 0)).cumsum(1).transpose(1, 2)
    sees = torch.ones(chunks + 1, chunks + 1, dtype=torch.bool, device=decays_BCH.device).tril()
    if owners_BC is not None:
        owners_BI = F.pad(owners_BC, (1, 0), value=-1)
        sees = (sees & (owners_BI[:, :, None] == owners_BI[:, None, :])).unsqueeze(1)
    states_BIHF = (decays(sums_BHI, sees).to(items_BHIF.dtype) @ items_BHIF).transpose(1, 2)
    states_BIHNP = states_BIHF.unflatten(3, added_BCHNP.shape[3:])
    return states_BIHNP[:, :-1], states_BIHNP[:, -1].float()


def decays(sums: Tensor, sees: Tensor) -> Tensor:
    """exp(sums_i - sums_j), float32, where i sees j, else 0; sums ... x Q: float64, sees ... x Q x Q."""
    high = sums.float()
    low = (sums.detach() - high.detach()).float()  # so that all that is large is float32
    differences = high[..., :, None] - high[..., None, :] + (low[..., :, None] - low[..., None, :])
    # What a token does to itself depends on no decay; as a difference, it would drown the others' gradients in noise.
    is_self = torch.eye(sums.shape[-1], dtype=torch.bool, device=sums.device)
    masked = torch.where(sees & ~is_self, differences, torch.where(is_self, 0.0, -torch.inf))
    return masked.exp()


def chunks_of(x_BT: Tensor, length: int, padding: int) -> Tensor:
    """B x T x ... to B x C x Q x ..., with zeros for `padding` tokens that are missing."""
    if padding:
        x_BT = F.pad(x_BT, (0, 0) * (x_BT.ndim - 2) + (0, padding))
    x_BCQ: Tensor = x_BT.unflatten(1, (-1, length))
    return x_BCQ


def where(condition_BCQ: Tensor | None, x_BCQH: Tensor) -> Tensor:
    """x, and 0 where the condition does not hold."""
    return x_BCQH if condition_BCQ is None else torch.where(condition_BCQ.unsqueeze(-1), x_BCQH, 0.0)


def scan_token(
    values_BHP: Tensor, steps_BH: Tensor, poles_H: Tensor, write_BGN: Tensor, read_BGN: Tensor, state_BHNP: Tensor
) -> tuple[Tensor, Tensor]:
    """One turn of the recurrence in float32: y B x H x P, and the state after this token."""
    share = values_BHP.shape[1] // write_BGN.shape[1]
    write_BHN, read_BHN = (x.float().repeat_interleave(share, 1) for x in (write_BGN, read_BGN))
    added_BHNP = write_BHN[..., None] * (values_BHP * steps_BH[..., None])[:, :, None]
    state_BHNP = (steps_BH * poles_H).exp()[..., None, None] * state_BHNP + added_BHNP
    y_BHP = (read_BHN[:, :, None] @ state_BHNP).squeeze(2)
    return y_BHP, state_BHNP


def sequential_scan(
    values_BTHP: Tensor,
    steps_BTH: Tensor,
    poles_H: Tensor,
    write_BTGN: Tensor,
    read_BTGN: Tensor,
    *,
    starts_BT: Tensor | None = None,
    state_BHNP: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What chunked_scan computes, token by token: its definition, to test against."""
    batch, tokens, heads, width = values_BTHP.shape
    if state_BHNP is None:
        state_BHNP = values_BTHP.new_zeros(batch, heads, write_BTGN.shape[3], width, dtype=torch.float32)
    outputs = []
    for t in range(tokens):
        if starts_BT is not None:
            state_BHNP = state_BHNP * (starts_BT[:, t] != t)[:, None, None, None]
        y_BHP, state_BHNP = scan_token(
            values_BTHP[:, t], steps_BTH[:, t], poles_H, write_BTGN[:, t], read_BTGN[:, t], state_BHNP
        )
        outputs.append(y_BHP)
    return torch.stack(outputs, 1).to(values_BTHP.dtype), state_BHNP
