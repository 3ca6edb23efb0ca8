"""Every engine, and what its gradients should be: one dense autograd graph that is cut by detaching."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from advice import open_ports
from torch import Tensor

from pylon_api.training import KvGradient, ModelSpec, RowActivations
from pylon_trainer.gating.depth import Depth
from pylon_trainer.gating.engine import Engine, HeadOnly
from pylon_trainer.gating.gradients import accumulate
from pylon_trainer.gating.single_pass import SinglePass
from pylon_trainer.gating.two_pass import TwoPass
from pylon_trainer.models import Decoder, build_model
from pylon_trainer.models.context import Context, Mixer
from pylon_trainer.models.decoder import Block
from pylon_trainer.step import Batch

AnyDecoder = TypeVar("AnyDecoder", bound=Decoder)
VOCABULARY = 37
WIDTH = 32
KEEP, RECOMPUTE = RowActivations.KEEP, RowActivations.RECOMPUTE
TRUNCATED, DENSE = KvGradient.TRUNCATED, KvGradient.DENSE

ENGINES = [
    "HeadOnly",
    "SinglePass-Truncated-Keep",
    "SinglePass-Truncated-Recompute",
    "SinglePass-Dense-Keep",
    "SinglePass-Dense-Recompute",
    "TwoPass-Truncated-Keep",
    "TwoPass-Truncated-Recompute",
]
ROW_ENGINES = ENGINES[1:]

RESONATE: dict[str, Any] = {
    "architecture": "Resonate",
    "layers": 4,
    "resonate": {
        "stateSize": 8,
        "headWidth": 16,
        "chunkTokens": 4,
        "longConvolutionEvery": 4,
        "attentionEvery": 4,
        "control": {"vectorSize": 8},
        "stability": {},
    },
}
"""A model with every kind of block, and ports."""

ADAPTED = RESONATE | {
    "resonate": RESONATE["resonate"]
    | {"adaptation": {"rank": 4, "maximumRank": 8, "codebook": {"subKeys": 8, "width": 8, "topK": 3}}},
}
"""The same with adapted layers whose scales differ from token to token."""


def model_of(**fields: object) -> Decoder:
    """A tiny model with weights large enough that a mistake shows."""
    torch.manual_seed(0)
    spec = {"layers": 3, "hidden_size": WIDTH, "heads": 2, "intermediate_size": 48, "initializer_std": 0.2}
    return open_ports(awaken(build_model(ModelSpec.model_validate(spec | fields), vocab_size=VOCABULARY)))


def awaken(model: AnyDecoder) -> AnyDecoder:
    """Give adapted layers, if there are any, weights where they begin at 0, so that a mistake in them shows."""
    draws = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if name.endswith(("outward.weight", "scales.weight")):
            torch.nn.init.normal_(parameter, std=0.2, generator=draws)
    return model


def batch_of(sequences: int = 3, length: int = 13, isolated: bool = False) -> Batch:
    draws = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(0, VOCABULARY, (sequences, length), generator=draws)
    documents_BT = (torch.arange(length) // 5).int().expand(sequences, -1).contiguous()
    return Batch(tokens_BT, tokens_BT.roll(-1, 1), documents_BT if isolated else None)


def gradient_of(rows: int, width: int = WIDTH) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(2))


def depth_of(rows: int, **fields: Any) -> Depth:
    """Ranks in no order."""
    ranks_K = torch.randperm(rows, generator=torch.Generator().manual_seed(3))
    return Depth(**{"ranks_K": ranks_K, "buckets": 4, "opened": 3, "leak_rate": 0.0, "start": 0.0} | fields)


def autocast(enabled: bool, device: str = "cpu") -> contextlib.AbstractContextManager[object]:
    return torch.autocast(device, torch.bfloat16, enabled=enabled, cache_enabled=False)


def engine_of(
    name: str,
    model: Decoder,
    *,
    bfloat16: bool = False,
    backend: str | Callable[..., Any] | None = None,
    depth_buckets: int = 1,
) -> Engine:
    """By its name in ENGINES, on the model's device."""
    device = model.embedding.weight.device.type

    def precise() -> contextlib.AbstractContextManager[object]:
        return autocast(bfloat16, device)

    engine, *options = name.split("-")
    if engine == "HeadOnly":
        return HeadOnly(model, precise)
    kv_gradient, activations = KvGradient(options[0]), RowActivations(options[1])
    if engine == "SinglePass":
        return SinglePass(model, precise, activations=activations, kv_gradient=kv_gradient, compile_backend=backend)
    return TwoPass(model, precise, activations=activations, depth_buckets=depth_buckets, compile_backend=backend)


def kv_gradient_of(name: str) -> KvGradient | None:
    """What the engine cuts; None: nothing."""
    return None if name == "HeadOnly" else KvGradient(name.split("-")[1])


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def run(
    engine: Engine, model: Decoder, batch: Batch, rows: Sequence[int], depth: Depth | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states and gradients of an engine, for one gradient at the rows."""
    model.zero_grad()
    device = batch.tokens_BT.device
    hidden_ND, back = engine.forward(batch)
    assert not hidden_ND.requires_grad
    rows_K = torch.tensor(rows, dtype=torch.int64, device=device)
    back(rows_K, gradient_of(len(rows), hidden_ND.shape[1]).to(device), accumulate, depth)
    return hidden_ND, gradients(model)


def reference(
    model: Decoder,
    batch: Batch,
    rows: Sequence[int],
    kv_gradient: KvGradient | None,
    bfloat16: bool = False,
    depth: Depth | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same by one backward pass through everything."""
    model.zero_grad()
    hidden_ND = cut_hidden(model, batch, rows, kv_gradient, bfloat16, depth)
    (hidden_ND[rows] * gradient_of(len(rows), hidden_ND.shape[1])).sum().backward()
    return hidden_ND.detach(), gradients(model)


def cut_hidden(
    model: Decoder,
    batch: Batch,
    rows: Sequence[int],
    kv_gradient: KvGradient | None,
    bfloat16: bool = False,
    depth: Depth | None = None,
) -> Tensor:
    """Hidden states N x D with the graph that a row engine stands for: below a block, gradient flows at the rows that
    go on from it; by the block's keys and values only to those rows, or to its weights too."""
    levels = levels_of(batch, rows, depth, len(model.blocks))

    def cut(x_BTD: Tensor, weights_BT1: Tensor) -> Tensor:
        return x_BTD if kv_gradient is None else x_BTD.detach() + weights_BT1 * (x_BTD - x_BTD.detach())

    def through(block: Block, x_BTD: Tensor, context: Context, weights_BT1: Tensor) -> Tensor:
        if kv_gradient is not TRUNCATED:
            return block(x_BTD, context)
        chosen_BT1 = weights_BT1 > 0

        def at_rows(x: Tensor) -> Tensor:
            return torch.where(chosen_BT1.unsqueeze(1) if x.ndim == 4 else chosen_BT1, x, x.detach())

        class Cut(Context):
            def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return context.attend(q, at_rows(k), at_rows(v))

            def mix(self, mixer: Mixer, x: Tensor) -> Tensor:
                return context.mix(mixer, at_rows(x))

        return block(x_BTD, Cut(**vars(context)))

    with autocast(bfloat16):
        context = model.context(batch.tokens_BT, batch.documents_BT)
        x_BTD = cut(model.embed(batch.tokens_BT, context.places), levels.pop())
        for block in model.blocks:
            weights_BT1 = levels.pop()
            x_BTD = cut(through(block, x_BTD, context, weights_BT1), weights_BT1)
        return model.norm(x_BTD).flatten(0, 1)


def levels_of(batch: Batch, rows: Sequence[int], depth: Depth | None, layers: int) -> list[Tensor]:
    """By the number of blocks gone back over, the weight of each token's gradient there, B x T x 1; 0 has none."""
    narrowings = {} if depth is None else depth.narrowings(layers)
    rows_M = torch.tensor(rows, dtype=torch.int64)
    levels = []
    for over in range(layers + 1):
        weights_M = torch.ones(len(rows_M))
        if over in narrowings:
            rows_M, weights_M = rows_M[narrowings[over].kept_R], narrowings[over].weights_R
        weights_N = torch.zeros(batch.tokens_BT.numel()).index_copy(0, rows_M, weights_M)
        levels.append(weights_N.view(*batch.tokens_BT.shape, 1))
    return levels


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        difference = (actual[name] - gradient).norm() / gradient.norm().clamp_min(1e-6)
        assert difference < tolerance, f"{name}: {difference}"
