"""Router: the lowest blocks of a model judge whole sequences through its own last norm and head.

It shares every weight with the model and has no graph, so it adds neither parameters nor keys of a checkpoint, and it
learns as the model does. What it says is a guess: hidden states a few blocks up are not what the head was trained on.

Shapes: B sequences of T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pylon_api.training import GatingSpec, GatingStrategy
from pylon_trainer.gating.ends import Autocast
from pylon_trainer.gating.head import Head
from pylon_trainer.gating.scores import judge
from pylon_trainer.gating.trunk import Trunk
from pylon_trainer.step import IGNORED, Batch


class SequenceScores(NamedTuple):
    """What the router says of every sequence; 0 where it has no label."""

    scores_B: Tensor
    """float32: mean score of its labelled tokens."""
    gradient_norm_B: Tensor
    """float32: norm of all its tokens' gradients at the logits, taken together."""
    labelled_B: Tensor
    """Whether it has a label at all."""
    nonfinite_rows: Tensor
    """int32 scalar: labelled tokens with a logit that is NaN or infinite."""


def router_layers(gating: GatingSpec, layers: int) -> int:
    """Blocks that the router runs, of a model of so many."""
    return gating.router_layers or max(1, layers // 4)


@torch.no_grad()
def score_sequences(
    trunk: Trunk, head: Head, batch: Batch, *, layers: int, strategy: GatingStrategy, autocast: Autocast
) -> SequenceScores:
    """Run the lowest `layers` blocks and the head over every sequence."""
    with autocast():
        context = trunk.context(batch.tokens_BT, batch.documents_BT)
        x_BTD = trunk.embed(batch.tokens_BT, context.places)
        for block in trunk.blocks[:layers]:
            x_BTD = block(x_BTD, context)
        hidden_ND = trunk.norm(x_BTD).flatten(0, 1)
    scores = head.score(hidden_ND, batch.labels_BT.flatten())
    labelled_BT = batch.labels_BT != IGNORED
    scores_BT = torch.where(labelled_BT, judge(strategy, scores).view_as(labelled_BT), 0.0)
    norms_BT = torch.where(labelled_BT, scores.gradient_norm_N.view_as(labelled_BT), 0.0)
    labels_B = labelled_BT.sum(1)
    return SequenceScores(
        scores_B=scores_BT.sum(1) / labels_B.clamp_min(1),
        gradient_norm_B=torch.linalg.vector_norm(norms_BT, dim=1),
        labelled_B=labels_B > 0,
        nonfinite_rows=scores.nonfinite_rows,
    )
