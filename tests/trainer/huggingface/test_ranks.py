"""Under DistributedDataParallel ranks agree on the gradients of all their sequences."""

from __future__ import annotations

from pathlib import Path

import torch
from ranks import run_ranks
from tiny_models import gradients, model_of, tokens_of
from torch.nn.parallel import DistributedDataParallel

import pylon_trainer.huggingface as pylon
from pylon_trainer.runtime.distributed import World

HALF = {"ratio_control": "Fixed", "token_ratio": 0.5, "selection": "Top"}


def test_ranks_average_their_gradients(tmp_path: Path) -> None:
    tokens_BT = tokens_of(sequences=4)

    def gradients_of(rank: int) -> dict[str, torch.Tensor]:
        model = model_of()
        pylon.enable(model, **HALF)
        model(tokens_BT[rank::2], labels=tokens_BT[rank::2]).loss.backward()
        return gradients(model)

    one, other = gradients_of(0), gradients_of(1)

    def take_part(world: World) -> None:
        model = model_of()
        pylon.enable(model, **HALF)
        distributed = DistributedDataParallel(model)
        mine_BT = tokens_BT[world.rank :: 2]
        distributed(mine_BT, labels=mine_BT).loss.backward()
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, (one[name] + other[name]) / 2, rtol=1e-4, atol=1e-6)

    run_ranks(take_part, tmp_path, 2)
