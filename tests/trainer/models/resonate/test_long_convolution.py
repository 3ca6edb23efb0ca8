"""The long convolution equals its definition, term by term."""

from __future__ import annotations

import pytest
import torch

from pylon_trainer.models.resonate import scan
from pylon_trainer.models.resonate.long_convolution import long_convolution

SEQUENCES, TOKENS, HEADS, WIDTH, EXPONENTIALS = 2, 37, 3, 4, 5


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 64])
@pytest.mark.parametrize("span_chunks", [2, 128])
def test_equals_the_sum_over_the_past(
    documents: bool, chunk_tokens: int, span_chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "SPAN_CHUNKS", span_chunks)
    torch.manual_seed(0)
    values = torch.randn(SEQUENCES, TOKENS, HEADS * WIDTH)
    exponents, gains = torch.rand(EXPONENTIALS), torch.randn(HEADS, EXPONENTIALS)
    numbers_BT = torch.stack([torch.arange(TOKENS) // 5, torch.arange(TOKENS) // 17])
    starts_BT = torch.searchsorted(numbers_BT, numbers_BT) if documents else None

    lags_TT = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    filters_HTT = (gains @ torch.exp(-exponents[:, None, None] * lags_TT.clamp_min(0)).flatten(1)).unflatten(
        1, (TOKENS, TOKENS)
    )
    sees_BTT = (lags_TT >= 0).expand(SEQUENCES, -1, -1)
    if starts_BT is not None:
        sees_BTT = sees_BTT & (torch.arange(TOKENS) >= starts_BT[..., None])
    heads_BTHP = values.unflatten(2, (HEADS, WIDTH))
    expected = torch.einsum("hts,bts,bshp->bthp", filters_HTT, sees_BTT.float(), heads_BTHP).flatten(2)

    y, _ = long_convolution(values, exponents, gains, chunk_tokens, starts_BT)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
