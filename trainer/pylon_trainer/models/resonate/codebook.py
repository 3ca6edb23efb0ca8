"""The codebook: atoms that the hyper-networks of all layers mix, found by product keys.

An atom's address is a pair of sub-keys, so its score is a sum of two: the best of all pairs are among the pairs of the
best of each half (Lample et al. 2019, arXiv:1907.05242), and a lookup scores 2 S sub-keys instead of S^2 atoms. Atoms
beyond the chosen get no gradient, the chosen and their sub-keys get it by the softmax over the chosen.

An atom that no address leads to learns nothing. What is revived is therefore sub-keys: one that is hardly used moves
next to one that is used most and takes copies of its atoms, which halves that one's work and hardly changes what the
model computes. Every rank does the same from the same sums, with noise from the same seed.

Shapes: S sub-keys of each half, S * S atoms of width W, K chosen; ... any.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pylon_api.training import CodebookSpec
from pylon_trainer.models.context import Context
from pylon_trainer.models.decoder import plain_linear

USAGE_DECAY = 0.5
"""Of what was counted before the last look, from look to look."""
DEAD_SHARE = 0.01
"""Of the mean use of a sub-key, below which one counts as dead."""
JITTER = 0.1
"""Deviation of a moved sub-key from the one it moves to, as a share of that one's size."""


class Codebook(nn.Module):
    """One for all layers and ranks."""

    counts: Tensor
    """S * S: how often this rank has chosen each atom since the last look, where gradients flow. Its own, unlike all
    else here, so it is no part of the model's state."""
    usage: Tensor
    """S * S: the same over all ranks and with the fading past."""

    def __init__(self, spec: CodebookSpec) -> None:
        super().__init__()
        self.spec = spec
        atoms = spec.sub_keys**2
        # As wide as atoms, so that all that is learnt here goes to other ranks as rows of one length.
        self.first = plain_linear(spec.width, spec.sub_keys)
        self.second = plain_linear(spec.width, spec.sub_keys)
        for keys in (self.first, self.second):
            nn.init.normal_(keys.weight, std=1 / math.sqrt(spec.width))
        self.atoms = nn.Parameter(torch.randn(atoms, spec.width))
        self.register_buffer("counts", torch.zeros(atoms), persistent=False)
        self.register_buffer("usage", torch.zeros(atoms))

    def forward(self, query: Tensor, context: Context) -> Tensor:
        """The mixture that a query ... x 2W asks for, ... x W, float32."""
        choice, weights = self.choose(query, context)
        # Once per step and token that carries gradient, in every engine; not where the model is frozen.
        if torch.is_grad_enabled() and self.atoms.requires_grad:
            self.counts.index_add_(0, choice.flatten(), torch.ones_like(self.counts[:1]).expand(choice.numel()))
        return (weights.unsqueeze(-2) @ F.embedding(choice, self.atoms)).squeeze(-2)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Atoms that are chosen in here do not count as used."""
        counts = self.counts.clone()
        try:
            yield
        finally:
            self.counts.copy_(counts)

    def choose(self, query: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """The K atoms with the highest scores, best first, and their weights, which add up to 1."""
        size, count = self.spec.sub_keys, self.spec.top_k
        halves = []
        for keys, half in zip((self.first, self.second), query.chunk(2, -1), strict=True):
            # Of one size whatever the layer, so that no layer's addresses are sharper than another's.
            normed = F.rms_norm(half.float(), (self.spec.width,))
            halves.append(context.linear(keys, normed).float().topk(count))
        (first_scores, first), (second_scores, second) = halves
        sums = (first_scores.unsqueeze(-1) + second_scores.unsqueeze(-2)).flatten(-2)
        scores, pairs = sums.topk(count)
        choice = first.gather(-1, pairs // count) * size + second.gather(-1, pairs % count)
        return choice, scores.softmax(-1)

    @torch.no_grad()
    def use_entropy(self) -> Tensor:
        """How evenly this rank, and all in the past, have used the atoms, scalar: 1 when all alike, 0 when only one."""
        seen = self.counts + self.usage
        shares = seen / seen.sum().clamp_min(1)
        entropy: Tensor = torch.special.entr(shares).sum()
        return entropy / math.log(len(shares))

    @torch.no_grad()
    def revive(self, counts: Tensor, seed: int) -> None:
        """Take in what all ranks have counted, and move the sub-keys of either half that are dead.

        seed: of the noise; the same on all ranks, another each time. Does not wait for the device.
        """
        self.usage.mul_(USAGE_DECAY).add_(counts)
        size = self.spec.sub_keys
        draws = torch.Generator().manual_seed(seed)
        square = self.usage.view(size, size)
        atoms = self.atoms.view(size, size, -1)
        self._split(square, atoms, self.first.weight, draws)
        self._split(square.T, atoms.transpose(0, 1), self.second.weight, draws)
        self.counts.zero_()

    def _split(self, usage_SS: Tensor, atoms_SSW: Tensor, keys_SW: Tensor, draws: torch.Generator) -> None:
        """usage, atoms: by this half's sub-key first. The least used pair off with the most used."""
        usage_S = usage_SS.sum(1)
        order_S = usage_S.argsort(descending=True, stable=True)
        pairs = len(order_S) // 2
        busy, idle = order_S[:pairs], order_S.flip(0)[:pairs]
        alive = usage_S.mean() * DEAD_SHARE
        moves_P1 = ((usage_S[idle] < alive) & (usage_S[busy] >= alive)).unsqueeze(1)
        noise_PW = torch.randn(pairs, keys_SW.shape[1], generator=draws).to(keys_SW.device, non_blocking=True)
        size_P1 = keys_SW[busy].square().mean(1, keepdim=True).sqrt()
        keys_SW[idle] = torch.where(moves_P1, keys_SW[busy] + JITTER * size_P1 * noise_PW, keys_SW[idle])
        atoms_SSW[idle] = torch.where(moves_P1.unsqueeze(2), atoms_SSW[busy], atoms_SSW[idle])
        halved_PS = usage_SS[busy] * torch.where(moves_P1, 0.5, 1.0)
        usage_SS[idle] = torch.where(moves_P1, halved_PS, usage_SS[idle])
        usage_SS[busy] = halved_PS
