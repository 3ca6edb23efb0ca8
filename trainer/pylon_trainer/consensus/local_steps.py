"""An Exchange of weights instead of gradients: each rank trains alone for some steps, then says how far it has come.

All ranks hold the same shared weights. After `localSteps` steps of its own a rank sends by how much it went away from
them; the shared weights follow the mean of all ranks with Nesterov momentum, and every rank goes on from there: DiLoCo
(Douillard et al. 2023, arXiv 2311.08105). The model is cut into as many fragments as there are local steps and one of
them is exchanged after each step, so that all steps take the same few bytes: Streaming DiLoCo (Douillard et al. 2025,
arXiv 2501.18512), here without overlap. What a codec loses stays in the rank's own weights, which therefore miss
nothing that the rank has learnt, and is part of what it sends next time, as in gossip with compressed differences
(Koloskova et al. 2019, arXiv 1902.00340): a coarse codec then delays only what others learn of it.

Shared weights and their momentum are alike on all ranks, bit for bit, at all times. A rank's own weights are so when
training ends, and where no loss is kept for one fragment at a time, when its turn ends.

Shapes: N values of a part, L values of a fragment of it, B blocks, V values of a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pylon_api.training import ConsensusCodec, ConsensusSpec
from pylon_trainer.consensus.channel import cut
from pylon_trainer.consensus.codecs import Codec
from pylon_trainer.consensus.codecs.dct import GROUPS, Dct
from pylon_trainer.consensus.codecs.exact import BFLOAT16, FLOAT32
from pylon_trainer.consensus.codecs.integers import Int4, Int8
from pylon_trainer.consensus.codecs.sign import Sign
from pylon_trainer.consensus.compressed import CONTROL_BYTES, DEFAULT_BYTES_PER_STEP
from pylon_trainer.consensus.reduction import sum_encoded, summed_bytes
from pylon_trainer.errors import SharedConfigError
from pylon_trainer.runtime.distributed import World

_DCT = tuple(Dct(group) for group in GROUPS)
_LADDERS: Mapping[ConsensusCodec, Sequence[Codec]] = {
    ConsensusCodec.EXACT: (FLOAT32,),
    ConsensusCodec.INT8: (Int8(),),
    ConsensusCodec.INT4: (Int4(),),
    ConsensusCodec.SIGN: (Sign(),),
    ConsensusCodec.DCT: _DCT,
    ConsensusCodec.AUTO: (FLOAT32, BFLOAT16, Int8(), Int4(), Sign(), *_DCT),
}
"""Codecs of matrices, the most exact first. Vectors are few and go as float32."""


class LocalSteps:
    """Fragments in turns."""

    smoothed = frozenset[str]()

    def __init__(self, world: World, spec: ConsensusSpec, parameters: Mapping[str, Tensor]) -> None:
        """parameters: float32 and contiguous, the same on all ranks; they are changed where they are.

        ConfigError when the spec's budget is too small.
        """
        self._world, self._spec, self._parameters = world, spec, parameters
        matrices = {name: parameter for name, parameter in parameters.items() if parameter.dim() > 1}
        vectors = {name: parameter for name, parameter in parameters.items() if parameter.dim() <= 1}
        codec = _choose_codec(world, spec, _values(matrices), _values(vectors))
        self._parts = {
            name: _Part(world, spec, chosen, tensors)
            for name, chosen, tensors in (("matrices", codec, matrices), ("vectors", FLOAT32, vectors))
            if _values(tensors)
        }
        self._turn = 0

    @property
    def channels(self) -> dict[str, str]:
        """The codec of each part of the model, by name."""
        return {name: part.codec.name for name, part in self._parts.items()}

    @property
    def replicas(self) -> dict[str, Tensor]:
        """See Exchange."""
        shared: dict[str, Tensor] = {}
        for part in self._parts.values():
            shared |= part.named(part.shared_N)
            shared |= {f"outer momentum of {name}": tensor for name, tensor in part.named(part.momentum_N).items()}
        return shared

    def exchange(self, named_gradients: Mapping[str, Tensor]) -> None:
        """See Exchange. Nothing travels but whether all ranks' are finite.

        Gradients are those of a mean over all ranks' tokens, so a rank's own, times the number of ranks, estimate
        the sum.
        """
        gradients = list(named_gradients.values())
        norm = torch.nn.utils.get_total_norm(gradients) * self._world.size
        is_bad = self._world.maximum((~norm.isfinite()).float()) > 0
        torch._foreach_mul_(gradients, torch.where(is_bad, torch.nan, float(self._world.size)))

    @torch.no_grad()
    def after_update(self, *, is_last: bool) -> None:
        """See Exchange. At the end local steps that no exchange has seen are given up, at most localSteps - 1 of a
        fragment's and at the lowest learning rate: no step takes more bytes than another."""
        for part in self._parts.values():
            part.exchange(self._turn % self._spec.local_steps)
        self._turn += 1
        if is_last:
            self._share_out()

    def state_dict(self) -> dict[str, Any]:
        """See Exchange. The shared weights and this rank's own are tensors of the run."""
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        return {
            "local_steps": self._spec.local_steps,
            "ranks": self._world.size,
            "turn": self._turn,
            "parts": parts,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See Exchange. All go on from the shared weights; whoever has their own again writes them afterwards.

        Of another number of local steps nothing is taken over, of another number of ranks nothing that was owed.
        """
        self._share_out()
        if state.get("local_steps") != self._spec.local_steps or state["parts"].keys() != self._parts.keys():
            return
        self._turn = state["turn"]
        for name, part in self._parts.items():
            part.load_state_dict(state["parts"][name], divides_alike=state.get("ranks") == self._world.size)

    def _share_out(self) -> None:
        """Make the shared weights this rank's own."""
        for part in self._parts.values():
            for name, shared in part.named(part.shared_N).items():
                self._parameters[name].copy_(shared)


class _Part:
    """Tensors of one codec, as one flat vector in the order of the model."""

    def __init__(self, world: World, spec: ConsensusSpec, codec: Codec, tensors: Mapping[str, Tensor]) -> None:
        self._world, self._spec, self.codec = world, spec, codec
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.shared_N = torch.cat([tensor.detach().flatten() for tensor in tensors.values()])
        self.momentum_N = torch.zeros_like(self.shared_N)
        self._keeps = spec.error_feedback and codec is not FLOAT32
        self._owed_N = torch.zeros_like(self.shared_N) if self._keeps and world.size > 2 else None
        """What the sums of this rank's parts lost."""
        self._length = _fragment_values(codec, len(self.shared_N), spec.local_steps)
        self._own = [_pieces(tensors, self._slice(turn)) for turn in range(spec.local_steps)]

    def named(self, flat_N: Tensor) -> dict[str, Tensor]:
        """Views of a flat vector, by the tensors' names."""
        parts = flat_N.split([shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def exchange(self, turn: int) -> None:
        """Of one fragment: shared weights and this rank's own become what all ranks make of them together."""
        own, here = self._own[turn], self._slice(turn)
        if not own:
            return  # more local steps than blocks
        shared_L, momentum_L = self.shared_N[here], self.momentum_N[here]
        gone_BV = cut((shared_L - torch.cat(own)) / self._world.size, self.codec.block_values)
        owed_BV = None if self._owed_N is None else cut(self._owed_N[here], self.codec.block_values)
        summed = sum_encoded(self._world, self.codec, gone_BV, owed_BV)
        mean_L = summed.sum_BV.view(-1)[: len(shared_L)]
        momentum_L.mul_(self._spec.outer_momentum).add_(mean_L)
        shared_L.sub_(mean_L + self._spec.outer_momentum * momentum_L, alpha=self._spec.outer_rate)
        own_L = shared_L
        if self._keeps:
            own_L = shared_L - self._world.size * summed.lost_BV.view(-1)[: len(shared_L)]
        if self._owed_N is not None and summed.lost_again_BV is not None:
            self._owed_N[here] = summed.lost_again_BV.view(-1)[: len(shared_L)]
        torch._foreach_copy_(own, own_L.split([len(piece) for piece in own]))

    def state_dict(self) -> dict[str, Any]:
        """What it needs beside the shared weights. Not copies."""
        return {"momentum": self.momentum_N} | ({} if self._owed_N is None else {"owed": self._owed_N})

    def load_state_dict(self, state: Mapping[str, Any], *, divides_alike: bool) -> None:
        """Go on from what state_dict gave. divides_alike: whether this rank's parts are those that it had."""
        self.momentum_N.copy_(state["momentum"])
        if self._owed_N is not None and divides_alike and "owed" in state:
            self._owed_N.copy_(state["owed"])

    def _slice(self, turn: int) -> slice:
        """Where a turn's fragment lies."""
        return slice(turn * self._length, min((turn + 1) * self._length, len(self.shared_N)))


def _pieces(tensors: Mapping[str, Tensor], here: slice) -> list[Tensor]:
    """Views of these tensors, flat, that one after the other are this slice of all of them in a row."""
    pieces, start = [], 0
    for tensor in tensors.values():
        flat_N = tensor.detach().view(-1)
        piece = flat_N[max(here.start - start, 0) : max(here.stop - start, 0)]
        pieces += [piece] if len(piece) else []
        start += len(flat_N)
    return pieces


def _choose_codec(world: World, spec: ConsensusSpec, matrix_values: int, vector_values: int) -> Codec:
    """The first of the ladder that fits the budget."""
    budget_bytes = spec.bytes_per_step or (DEFAULT_BYTES_PER_STEP if spec.codec.fills_budget else None)
    least_bytes = 0
    for codec in _LADDERS[spec.codec]:
        least_bytes = CONTROL_BYTES + sum(
            summed_bytes(each, _fragment_values(each, values, spec.local_steps) // each.block_values, world.size)
            for each, values in ((codec, matrix_values), (FLOAT32, vector_values))
        )
        if budget_bytes is None or least_bytes <= budget_bytes:
            return codec
    raise SharedConfigError(
        f"training.consensus.bytesPerStep {budget_bytes} is too small: the least possible with localSteps "
        f"{spec.local_steps} is {least_bytes} bytes a step ({codec.name}); raise either"
    )


def _fragment_values(codec: Codec, values: int, fragments: int) -> int:
    """Values of a fragment, in whole blocks; the last one may have fewer."""
    return -(-values // (codec.block_values * fragments)) * codec.block_values


def _values(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())
