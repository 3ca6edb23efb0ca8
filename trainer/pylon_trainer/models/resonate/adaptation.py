"""Adaptation of a whole model: which layers are adapted (dlra.py), and what they have in common.

Adapted are the linear layers of mixers, attention and MLPs that are wider than the ranks; norms, convolutions,
embeddings and heads learn as they do without.
"""

from __future__ import annotations

import hashlib

from torch import Tensor, nn

from pylon_api.training import AdaptationBase, AdaptationSpec, ModelSpec, ResonateSpec
from pylon_trainer.models.context import Context
from pylon_trainer.models.decoder import Block, Decoder
from pylon_trainer.models.resonate.codebook import Codebook
from pylon_trainer.models.resonate.dlra import AdaptedContext, AdaptedLinear, Ranks, generate
from pylon_trainer.models.resonate.hyper import HyperNetwork

_PARTS = ("mixer", "attention", "mlp")
"""Of a block, whose layers are adapted."""


class Adaptation(nn.Module):
    """Of one block."""

    def __init__(self, ranks: Ranks, layers: int, hyper: HyperNetwork | None) -> None:
        super().__init__()
        self.ranks = ranks
        self.layers = layers
        self.hyper = hyper

    def offers(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, ...]:
        """What tokens offer to later ones, beside what the block's own layers offer."""
        return () if self.hyper is None else (self.hyper.offers(x_BTD, context),)

    def enter(self, offered: tuple[Tensor, ...], context: Context) -> AdaptedContext:
        """The context for the block's layers, from what all tokens offer."""
        active_R = self.ranks.active_R
        if self.hyper is None:
            return AdaptedContext.within(context, (active_R,) * self.layers)
        scales = self.hyper(*offered, context)
        return AdaptedContext.within(context, tuple(scale * active_R for scale in scales))


class AdaptedBlock(Block):
    """Before a class of blocks among the bases of one: that block with adapted layers."""

    adaptation: Adaptation

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """As Block has it."""
        entered = self.adaptation.enter(self.adaptation.offers(x_BTD, context), context)
        return super().forward(x_BTD, entered)  # type: ignore[safe-super]  # the next base has it

    def offers(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, ...]:
        """As Block has it: what the summary takes, if there is one, then what the block offers."""
        offered = self.adaptation.offers(x_BTD, context)
        entered = self.adaptation.enter(offered, context)
        return *offered, *super().offers(x_BTD, entered)  # type: ignore[safe-super]  # the next base has it

    def open_ports(self, advice_size: int) -> None:
        """As Block has it."""
        super().open_ports(advice_size)  # type: ignore[safe-super]  # the next base has it
        if self.adaptation.hyper is not None:
            self.adaptation.hyper.open_ports(advice_size)


class Shared(nn.Module):
    """What all blocks of an adapted model share, each with the same modules among its own."""

    def __init__(self, spec: AdaptationSpec) -> None:
        super().__init__()
        self.ranks = Ranks(spec)
        self.codebook = None if spec.codebook is None else Codebook(spec.codebook)


def adapt(model: Decoder, spec: AdaptationSpec) -> tuple[Shared, str | None]:
    """Put adapted layers in the place of plain ones, in a model that has just been initialised and whose blocks are
    AdaptedBlocks. Returns what they share, and a digest of what was generated, or None."""
    shared, digest = Shared(spec), hashlib.sha256()
    for number, block in enumerate(model.blocks):
        assert isinstance(block, AdaptedBlock)
        layers = _large_layers(block, spec.allocated_rank)
        residual = block.residual_outputs()
        for place, (path, layer) in enumerate(layers.items()):
            std, generated = model.initial_std(is_residual=layer in residual), None
            if spec.base is AdaptationBase.SEED:
                name = f"blocks.{number}.{path}"
                generated = generate(spec.base_seed, name, layer.out_features, layer.in_features, std)
                digest.update(generated.numpy().data)
            parent, _, child = path.rpartition(".")
            block.get_submodule(parent).register_module(child, AdaptedLinear(layer, spec, place, std, generated))
        block.adaptation = Adaptation(shared.ranks, len(layers), _hyper(model.spec, spec, shared.codebook, len(layers)))
    return shared, digest.hexdigest() if spec.base is AdaptationBase.SEED else None


def _large_layers(block: Block, rank: int) -> dict[str, nn.Linear]:
    return {
        path: layer
        for path, layer in block.named_modules()
        if isinstance(layer, nn.Linear)
        and path.partition(".")[0] in _PARTS
        and min(layer.in_features, layer.out_features) > rank
    }


def _hyper(model: ModelSpec, spec: AdaptationSpec, codebook: Codebook | None, layers: int) -> HyperNetwork | None:
    if codebook is None:
        return None
    chunk_tokens = (model.resonate or ResonateSpec()).chunk_tokens
    return HyperNetwork(model.hidden_size, layers, spec.allocated_rank, chunk_tokens, codebook)
