"""A convolution over the whole past with a learnt filter for every head, as long as the sequence.

Filters are sums of N exponentials, h(lag) = sum_n c_n * rate_n^lag, over a bank of rates that the layer's heads share.
So the filter has N numbers and any length, and the convolution is a recurrence as well: products of matrices by chunks
while training, a state of fixed size while generating, equal to each other. It is the scan of scan.py with decays
that the tokens cannot change (a diagonal state space with real poles: Gu et al. 2022, arXiv:2206.11893), with more of
them; what a token is for has to come from the gate and the short convolution.

Shapes: B sequences, T tokens, C chunks of Q tokens, H heads of width P, F = H * P channels, N exponentials, W tokens
of the short convolution.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pylon_api.training import ModelSpec, ResonateSpec
from pylon_trainer.kernels.gated_norm import gated_norm
from pylon_trainer.models.context import Memory
from pylon_trainer.models.ports import skip_with
from pylon_trainer.models.resonate.mixer import ShortConvolution, StateMixer
from pylon_trainer.models.resonate.scan import Borders, by_spans, carry, chunks_of, where

LONGEST_TOKENS = 4096.0
"""The slowest exponential falls to 1/e in so many tokens at first, the fastest in one; the others lie between, evenly
by their logarithms."""


class LongConvolution(StateMixer):
    """A mixer that treats all tokens alike."""

    def __init__(self, spec: ModelSpec) -> None:
        own = spec.resonate or ResonateSpec()
        inner = own.expand * spec.hidden_size
        super().__init__(spec.hidden_size, 2 * inner, inner)
        self.own = own
        self.epsilon = spec.norm_epsilon
        heads = inner // own.head_width
        self.convolution = ShortConvolution(inner, own.conv_width)
        self.log_rates = nn.Parameter(-torch.linspace(0, math.log(LONGEST_TOKENS), own.state_size))
        """N: logarithms of the exponents, whose negatives are the logarithms of the decays per token."""
        self.filters = nn.Parameter(torch.randn(heads, own.state_size) / math.sqrt(own.state_size))
        """H x N."""
        self.skip = nn.Parameter(torch.ones(heads))
        self.norm_weight = nn.Parameter(torch.ones(inner))

    def run(
        self,
        x_BTI: Tensor,
        starts_BT: Tensor | None = None,
        memory: Memory | None = None,
        advice_PR: Tensor | None = None,
    ) -> tuple[Tensor, Memory]:
        """As Mixer has it. Memory: the short convolution's last W - 1 inputs, and the state B x N x 1 x F, float32."""
        recent_BVF, state_BN1F = (None, None) if memory is None else memory
        gate_BTF, channels_BTF = x_BTI.chunk(2, -1)
        values_BTF, recent_BVF = self.convolution(channels_BTF, starts_BT, recent_BVF)
        exponents_N = self.log_rates.float().exp()
        # Each exponential answers noise with noise of the same size.
        gains_HN = self.filters * (1 - (-2 * exponents_N).exp()).sqrt()
        y_BTF, state_BN1F = long_convolution(
            values_BTF, exponents_N, gains_HN, self.own.chunk_tokens, starts_BT, state_BN1F
        )
        skip_H = skip_with(self.skip, self.port_skip, advice_PR)
        y_BTF = gated_norm(
            y_BTF, values_BTF, skip_H, gate_BTF, self.norm_weight, groups=self.own.groups, epsilon=self.epsilon
        )
        return y_BTF, (recent_BVF, state_BN1F)


def long_convolution(
    values_BTF: Tensor,
    exponents_N: Tensor,
    gains_HN: Tensor,
    chunk_tokens: int,
    starts_BT: Tensor | None = None,
    state_BN1F: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = sum over n and over s <= t in its document of gains_n * exp(-exponents_n * (t - s)) * values_s, and the
    state after the last token, float32; state_BN1F: of the tokens before, None is zero."""

    def convolve_span(state: Tensor | None, starts: Tensor | None, values: Tensor) -> tuple[Tensor, Tensor]:
        return _convolve_span(values, exponents_N, gains_HN, chunk_tokens, starts, state)

    return by_spans(convolve_span, chunk_tokens, state_BN1F, starts_BT, values_BTF)


def _convolve_span(
    values_BTF: Tensor,
    exponents_N: Tensor,
    gains_HN: Tensor,
    chunk_tokens: int,
    starts_BT: Tensor | None,
    state_BN1F: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, tokens, _ = values_BTF.shape
    dtype, heads = values_BTF.dtype, len(gains_HN)
    length = min(chunk_tokens, tokens)
    padding = -tokens % length
    values_BCQF = chunks_of(values_BTF, length, padding)
    borders = Borders.of(starts_BT, tokens, length, values_BTF.device)
    # Tokens that are missing let nothing decay.
    real_CQ = chunks_of(torch.ones_like(values_BTF[:1, :, 0], dtype=torch.float64), length, padding).squeeze(0)
    sums_CNQ = (real_CQ[..., None] * -exponents_N).cumsum(1).transpose(1, 2)
    lags_Q = torch.arange(length, device=values_BTF.device)

    # Within chunks: one Toeplitz matrix for every head, the same for all chunks but for documents.
    answers_HQ = gains_HN @ (-exponents_N[:, None] * lags_Q).exp()
    toeplitz_HQQ = answers_HQ[:, (lags_Q[:, None] - lags_Q).clamp_min(0)]
    weights = toeplitz_HQQ.masked_fill(~borders.sees, 0.0).to(dtype)
    values_BCHQP = values_BCQF.unflatten(-1, (heads, -1)).transpose(2, 3)
    near_BCQF = (weights @ values_BCHQP).transpose(2, 3).flatten(3)

    # What each chunk adds to the state, and the state that enters it.
    decays_CQN = (sums_CNQ[..., -1:] - sums_CNQ).float().exp().transpose(1, 2)
    decays_BCQN = where(borders.remains_BCQ, decays_CQN.expand(batch, -1, -1, -1))
    added_BCNF = decays_BCQN.to(dtype).mT @ values_BCQF
    totals_BCN = sums_CNQ[..., -1].expand(batch, -1, -1)
    states_BCN1F, state_BN1F = carry(added_BCNF.unsqueeze(3), totals_BCN, borders.owners_BC, state_BN1F)

    # What the tokens hear of it.
    heard_BCNF = (states_BCN1F.squeeze(3).unflatten(-1, (heads, -1)) * gains_HN.T[..., None]).flatten(3)
    decays_BCQN = where(borders.reached_BCQ, sums_CNQ.float().exp().transpose(1, 2).expand(batch, -1, -1, -1))
    far_BCQF = decays_BCQN.to(dtype) @ heard_BCNF.to(dtype)
    return (near_BCQF + far_BCQF).flatten(1, 2)[:, :tokens].to(dtype), state_BN1F
