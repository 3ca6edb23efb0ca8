"""What a call of a causal language model asks for, read as the model's own forward would read it.

Refuses, by the argument's name, whatever a gated step cannot give: logits kept for some rows only, hidden states,
attention maps, caches, embeddings in place of ids.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pylon_trainer.errors import ConfigError
from pylon_trainer.step import IGNORED, Batch

_HARMLESS = {
    "use_cache",  # nothing is generated
    "return_dict",
    "fused_lm_head",  # TRL's, read by the caller
    "cu_seq_lens_q",  # the same as position_ids say
    "cu_seq_lens_k",
    "seq_idx",
    "max_length_q",
    "max_length_k",
}


@dataclass(frozen=True, slots=True)
class Request:
    """One call of a model."""

    batch: Batch
    """Tokens, and labels that are already shifted; all IGNORED where there are none."""
    positions_BT: Tensor
    """int64, or 1 x T when all sequences have the same."""
    starts_BT: Tensor | None
    """int64: first place of its sequence that each token may see; None is 0."""
    items: Tensor | int | None
    """Labelled tokens of all micro-batches of a step; None: of this call."""

    @property
    def divisor(self) -> Tensor | int:
        """What the sum of losses is divided by."""
        return divisor_of(self.items, self.batch.labels_BT != IGNORED)


def divisor_of(items: Tensor | int | None, labelled: Tensor) -> Tensor | int:
    """`num_items_in_batch` where it is given, else the number of labelled tokens, and never 0."""
    if items is None:
        items = labelled.sum()
    return items.to(labelled.device).clamp_min(1) if isinstance(items, Tensor) else max(1, items)


def has_labels(arguments: Mapping[str, Any]) -> bool:
    """Whether a call asks for a loss."""
    return arguments.get("labels") is not None or arguments.get("shift_labels") is not None


def read(arguments: Mapping[str, Any], window: int | None) -> Request:
    """Raises ConfigError for arguments that a gated step cannot honour."""
    given = {name: value for name, value in arguments.items() if value is not None and value is not False}
    tokens_BT = given.pop("input_ids", None)
    if tokens_BT is None:
        raise ConfigError("input_ids: a gated step needs token ids; do not pass inputs_embeds instead")
    labels_BT = given.pop("labels", None)
    shifted_BT = given.pop("shift_labels", None)
    items = given.pop("num_items_in_batch", None)
    mask_BT = given.pop("attention_mask", None)
    positions_BT = given.pop("position_ids", None)
    if isinstance(given.get("logits_to_keep"), int) and given["logits_to_keep"] == 0:
        del given["logits_to_keep"]
    refused = sorted(given.keys() - _HARMLESS)
    if refused:
        raise ConfigError(f"{refused[0]}: a gated step cannot honour it; leave it out or call disable() first")
    if shifted_BT is None:
        labels_BT = torch.full_like(tokens_BT, IGNORED) if labels_BT is None else labels_BT
        shifted_BT = F.pad(labels_BT, (0, 1), value=IGNORED)[:, 1:]
    starts_BT = first_places(tokens_BT, mask_BT, positions_BT, window)
    if mask_BT is not None:
        # Padding before a sequence has no context to predict its first token from.
        shifted_BT = shifted_BT.masked_fill(mask_BT.cumsum(-1) == 0, IGNORED)
    if positions_BT is None:
        positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).unsqueeze(0)
    return Request(Batch(tokens_BT, shifted_BT.to(tokens_BT.device)), positions_BT, starts_BT, items)


def first_places(
    tokens_BT: Tensor, mask_BT: Tensor | None, positions_BT: Tensor | None, window: int | None
) -> Tensor | None:
    """The first place that each token may see, as the model's own masks have it; None when all see all before them.

    As in the model itself, positions that start again mark documents only where no attention mask is given, and a mask
    is looked at on the host. Padding at the end needs nothing: no token looks ahead.
    """
    sequences, length = tokens_BT.shape
    places_T = torch.arange(length, device=tokens_BT.device)
    starts_BT = None
    if mask_BT is not None:
        starts_BT = _after_padding(mask_BT, places_T)
    elif positions_BT is not None:
        restarts_BT = F.pad(positions_BT.diff(dim=-1) != 1, (1, 0), value=False)
        starts_BT = torch.where(restarts_BT, places_T, 0).cummax(dim=-1).values
    if window is not None and window < length:
        opens_T = (places_T - window + 1).clamp_min(0)
        starts_BT = opens_T.unsqueeze(0) if starts_BT is None else starts_BT.maximum(opens_T)
    return None if starts_BT is None else starts_BT.expand(sequences, -1).contiguous()


def _after_padding(mask_BT: Tensor, places_T: Tensor) -> Tensor | None:
    if mask_BT.ndim != 2:
        raise ConfigError(f"attention_mask: shape {tuple(mask_BT.shape)} is not sequences x tokens; pass padding only")
    real_BT = mask_BT.bool()
    first_B1 = real_BT.int().argmax(dim=-1, keepdim=True)
    last_B1 = places_T[-1] - real_BT.flip(-1).int().argmax(dim=-1, keepdim=True)
    inside_BT = (places_T >= first_B1) & (places_T <= last_B1)
    has_holes, is_left_padded = torch.stack(
        ((inside_BT & ~real_BT)[real_BT.any(-1)].any(), ~real_BT[:, 0].all())
    ).tolist()
    if has_holes:
        raise ConfigError("attention_mask: zeros between ones are not padding; mark documents by position_ids instead")
    return first_B1.minimum(places_T) if is_left_padded else None
