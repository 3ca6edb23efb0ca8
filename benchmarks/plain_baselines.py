"""The strongest plain step that can be had here, so that no gate looks good beside a weak one.

Three heads compete over the same compiled blocks: Pylon's own, Liger's fused linear cross entropy where
`liger_kernel` is installed, and compiled cross entropy over all logits at once. Attention takes the fastest backend at
the shape that is measured, for gated and plain steps alike.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from measure import milliseconds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pylon_api.training import ModelSpec
from pylon_trainer.models import Decoder
from pylon_trainer.step import IGNORED, Batch

LossSum = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of hidden states N x D, head weight V x D and labels N, both in the precision of products."""


class Trainable(Protocol):
    """The part of a TrainingStep that adds to the gradients."""

    def forward_backward(self, batch: Batch, *, global_tokens: int, step: int) -> object:
        """As TrainingStep has it."""
        ...


BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


@dataclass(frozen=True)
class WholeHeadStep:
    """A plain step on CUDA in bfloat16 whose head and loss are another's, by one backward pass through everything."""

    model: Decoder
    loss_sum: LossSum

    def forward_backward(self, batch: Batch, *, global_tokens: int, step: int) -> None:  # noqa: ARG002
        """As TrainingStep has it."""
        with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
            hidden_ND = self.model(batch.tokens_BT, batch.documents_BT).flatten(0, 1)
        weight_VD = self.model.head_weight.bfloat16()
        loss = self.loss_sum(hidden_ND.bfloat16(), weight_VD, batch.labels_BT.flatten())
        (loss / global_tokens).backward()


def rival_heads() -> dict[str, LossSum]:
    """By name, what competes with Pylon's own head."""
    rivals: dict[str, LossSum] = {"all logits, compiled": torch.compile(_all_logits, dynamic=False)}
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # type: ignore[import-not-found]

        liger = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, reduction="sum")
        rivals["Liger"] = lambda hidden_ND, weight_VD, labels_N: liger(weight_VD, hidden_ND, labels_N)
    return rivals


def _all_logits(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    return F.cross_entropy((hidden_ND @ weight_VD.T).float(), labels_N, ignore_index=IGNORED, reduction="sum")


@contextmanager
def fastest_attention(spec: ModelSpec, sequences: int, tokens: int) -> Iterator[None]:
    """Attention runs on the backend that is fastest forward and backward at this shape, on others where it cannot."""
    times_ms = attention_ms(spec, sequences, tokens)
    order = sorted(times_ms, key=lambda backend: times_ms[backend])
    print("  attention: " + ", ".join(f"{backend.name} {times_ms[backend]:.2f} ms" for backend in order), flush=True)
    with sdpa_kernel([*order, *(backend for backend in BACKENDS if backend not in order)], set_priority=True):
        yield


def attention_ms(spec: ModelSpec, sequences: int, tokens: int) -> dict[SDPBackend, float]:
    """Forward and backward of one block's attention on every fused backend that can."""
    width = spec.hidden_size // spec.heads
    q_BHTE, k_BJTE, v_BJTE = (
        torch.randn(sequences, heads, tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (spec.heads, *[spec.kv_heads or spec.heads] * 2)
    )

    def attend() -> None:
        y_BHTE = F.scaled_dot_product_attention(
            q_BHTE, k_BJTE, v_BJTE, is_causal=True, enable_gqa=q_BHTE.shape[1] != k_BJTE.shape[1]
        )
        torch.autograd.grad(y_BHTE.sum(), (q_BHTE, k_BJTE, v_BJTE))

    times_ms: dict[SDPBackend, float] = {}
    for backend in BACKENDS[:-1]:
        with sdpa_kernel(backend):
            try:
                times_ms[backend] = milliseconds(attend, repeat_ms=50)
            except RuntimeError as error:  # no kernel of this backend for this shape
                print(f"  attention: {backend.name} cannot run here: {str(error).splitlines()[0]}")
    return times_ms
