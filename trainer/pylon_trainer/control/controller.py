"""The controller: figures of every rank in, advice to all blocks (the resonance vector) out.

Ranks are a set: each one's figures go through the same layer, and what comes out is averaged (Deep Sets: Zaheer et al.
2017, arXiv:1703.06114). So any number of ranks will do, and all that compute from the same gathered figures say the
same, bit for bit. Figures are told as how far they are from where they usually are, so no units matter.

Shapes: K ranks, S figures of one, R size of the advice.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH = 64
"""Of the two hidden layers; the controller is to stay smaller than what it advises."""

USUAL_WEIGHT = 0.1
"""Of a new figure in what is usual: a memory of about ten turns."""


class Controller(nn.Module):
    """Three layers. It has no reference to what it advises."""

    usual_S: Tensor
    """Means of past figures over ranks and turns; NaN before the first."""

    def __init__(self, figures: int, advice_size: int) -> None:
        """figures: S. advice_size: R."""
        super().__init__()
        self.each = nn.Linear(figures, WIDTH)
        self.all = nn.Linear(WIDTH, WIDTH)
        self.say = nn.Linear(WIDTH, advice_size)
        self.register_buffer("usual_S", torch.full((figures,), torch.nan))

    def forward(self, unusual_KS: Tensor) -> Tensor:
        """Advice R, each number between -1 and 1."""
        hidden_KW = nn.functional.silu(self.each(unusual_KS))
        hidden_W = nn.functional.silu(self.all(hidden_KW.mean(0)))
        advice_R: Tensor = self.say(hidden_W).tanh()
        return advice_R

    @torch.no_grad()
    def compare(self, figures_KS: Tensor) -> Tensor:
        """How unusual figures are, each from -1 to 1, and learn from them what is usual. One that is not a number
        counts as usual, and nothing that is not finite becomes usual."""
        mean_S = figures_KS.mean(0)
        mean_S = torch.where(mean_S.isfinite(), mean_S, self.usual_S)
        usual_S = torch.where(self.usual_S.isnan(), mean_S, self.usual_S)
        self.usual_S.copy_(usual_S.lerp(mean_S, USUAL_WEIGHT))
        return (figures_KS - usual_S).tanh().nan_to_num(0)
