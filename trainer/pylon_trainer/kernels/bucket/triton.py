"""Buckets by rank in linear time: radix selection of every border at once.

A float32 becomes an integer key of the same order. Three passes fix the border's key digit by digit: count the digits
of the keys that still agree with the border, then step down from the highest digit until enough rows are above. What is
left to decide is how many of the rows that equal the border belong above it: the first of them, so a prefix count of
equals ends the matter. Counts are integers, so the result is exact and the same in every run.

Shapes: N scores, B borders, G blocks of scores, D values of a digit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pylon_trainer.kernels.bucket.reference import Buckets

DIGIT_BITS = (11, 11, 10)
KEY_BITS = tl.constexpr(32)
BLOCK = 1024


@triton.jit
def _load_keys(scores_N, n, N):
    """Keys in 0 to 2^32 - 1 that order as their scores do: all bits of a negative number turned, else the sign."""
    score = tl.load(scores_N + n, mask=n < N, other=0.0) + 0.0  # -0 + 0 is 0
    bits = score.to(tl.uint32, bitcast=True).to(tl.int64)
    key = tl.where(bits >> 31 == 1, 0xFFFFFFFF - bits, bits + 0x80000000)
    return tl.where(score == score, key, 0xFFFFFFFF)


@triton.jit
def _count_kernel(scores_N, prefix_B, counts_BD, N, SHIFT: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    b = tl.program_id(1)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = _load_keys(scores_N, n, N)
    agrees = (n < N) & (key // (D << SHIFT) == tl.load(prefix_B + b))
    counts_D = tl.histogram(((key >> SHIFT) % D).to(tl.int32), D, mask=agrees)
    tl.atomic_add(counts_BD + b * D + tl.arange(0, D), counts_D, mask=counts_D > 0, sem="relaxed")


@triton.jit
def _descend_kernel(counts_BD, prefix_B, missing_B, D: tl.constexpr):
    """Choose the digit at which the missing rows are reached, counting from the highest."""
    b = tl.program_id(0)
    counts_D = tl.load(counts_BD + b * D + tl.arange(0, D))
    above_D = tl.sum(counts_D, 0) - tl.cumsum(counts_D, 0)
    missing = tl.load(missing_B + b)
    here_D = (above_D < missing) & (missing <= above_D + counts_D)
    digit = tl.sum(tl.where(here_D, tl.arange(0, D), 0), 0)
    tl.store(prefix_B + b, tl.load(prefix_B + b) * D + digit)
    tl.store(missing_B + b, missing - tl.sum(tl.where(here_D, above_D, 0), 0))


@triton.jit
def _count_equals_kernel(scores_N, border_B, equals_BG, N, G, BLOCK: tl.constexpr):
    g, b = tl.program_id(0), tl.program_id(1)
    n = g * BLOCK + tl.arange(0, BLOCK)
    equals = (n < N) & (_load_keys(scores_N, n, N) == tl.load(border_B + b))
    tl.store(equals_BG + b * G + g, tl.sum(equals.to(tl.int32), 0))


@triton.jit
def _assign_kernel(
    scores_N, border_B, missing_B, equals_BG, bucket_N, thresholds_B, N, G,
    B: tl.constexpr, G_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0)
    n = g * BLOCK + tl.arange(0, BLOCK)
    earlier_G = tl.arange(0, G_PADDED)
    key = _load_keys(scores_N, n, N)
    bucket = tl.zeros([BLOCK], tl.int32)
    for b in tl.static_range(B):
        border = tl.load(border_B + b)
        equal = (n < N) & (key == border)
        missing = tl.load(missing_B + b)
        before = tl.sum(tl.load(equals_BG + b * G + earlier_G, mask=earlier_G < g, other=0), 0)
        place = before + tl.cumsum(equal.to(tl.int32), 0)
        bucket += tl.where((key > border) | (equal & (place <= missing)), 0, 1)
        # One row is the last above the border, so one program writes its score.
        last = equal & (place == missing)
        tl.store(thresholds_B + b + n * 0, tl.load(scores_N + n, mask=last), mask=last)
    tl.store(bucket_N + n, bucket, mask=n < N)


def bucket(scores_N: Tensor, ends: Sequence[int]) -> Buckets:
    """As `reference.bucket`, in five reads of the scores."""
    scores_N, device = scores_N.contiguous(), scores_N.device
    N, B, G = len(scores_N), len(ends), triton.cdiv(len(scores_N), BLOCK)
    thresholds_B = torch.empty(B, dtype=torch.float32, device=device)
    if B == 0:
        return Buckets(torch.zeros(N, dtype=torch.int32, device=device), thresholds_B)
    bucket_N = torch.empty(N, dtype=torch.int32, device=device)
    prefix_B = torch.zeros(B, dtype=torch.int64, device=device)
    # Filled in by the device: a copy from the host would wait for it, or be read again by a recorded step's replay.
    missing_B = torch.cat([torch.full((1,), end, dtype=torch.int32, device=device) for end in ends])
    shift = KEY_BITS.value
    for bits in DIGIT_BITS:
        shift -= bits
        counts_BD = torch.zeros((B, 2**bits), dtype=torch.int32, device=device)
        _count_kernel[(G, B)](scores_N, prefix_B, counts_BD, N, SHIFT=shift, D=2**bits, BLOCK=BLOCK)
        _descend_kernel[(B,)](counts_BD, prefix_B, missing_B, D=2**bits)
    equals_BG = torch.empty((B, G), dtype=torch.int32, device=device)
    _count_equals_kernel[(G, B)](scores_N, prefix_B, equals_BG, N, G, BLOCK=BLOCK)
    _assign_kernel[(G,)](
        scores_N, prefix_B, missing_B, equals_BG, bucket_N, thresholds_B, N, G,
        B=B, G_PADDED=triton.next_power_of_2(G), BLOCK=BLOCK,
    )  # fmt: skip
    return Buckets(bucket_N, thresholds_B)
