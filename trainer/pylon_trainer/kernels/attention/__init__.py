"""Attention of chosen, scattered rows to all keys of their own sequences, with gradients.

For K of N rows it costs K / N of a causal attention forward; backward, the gradient of the queries costs K / N and that
of the rows' own keys and values (K / N)^2. How many rows each sequence has is known to the device alone, and nothing
here asks. Refuses to choose rows, and rows that see keys of other sequences or after their own place.

Shapes: B sequences, T tokens, N = B * T, K rows, H query heads, J key and value heads (H / J query heads share one), E
width of a head. Places count through all sequences: token t of sequence b is at b * T + t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pylon_trainer.kernels.attention import reference
from pylon_trainer.kernels.attention.operators import attend_all as fused_attend_all
from pylon_trainer.kernels.attention.operators import attend_rows as fused_attend_rows

__all__ = ["Attended", "Layout", "attend_all", "attend_rows"]

WIDEST_HEAD = 256


@dataclass(frozen=True)
class Layout:
    """Where rows lie and what they see: the same for all layers, so computed once per step."""

    rows_K: Tensor
    """int32: places of the rows, distinct and rising."""
    first_K: Tensor
    """int32: the first place that each row sees. It sees all from there to its own."""
    ends_B: Tensor
    """int32: number of rows in this and all earlier sequences."""
    until_K: Tensor
    """int32: the first row, counted in K, that comes after row k and does not see it any more."""
    windowed: bool
    """Whether some rows may not see the beginning of their sequence."""

    @classmethod
    def of(cls, rows_K: Tensor, starts_K: Tensor | None, sequences: int, tokens: int) -> Layout:
        """The layout of distinct, rising places.

        starts_K: the first token of its sequence, 0 to T - 1, that each row may see, never falling within a sequence;
        as borders of documents and sliding windows give it. None: all see the beginning.
        """
        rows_K = rows_K.to(torch.int32).contiguous()
        first_K = rows_K - rows_K % tokens
        if starts_K is not None:
            first_K = first_K + starts_K.to(torch.int32)
        borders_B = torch.arange(1, sequences + 1, dtype=torch.int32, device=rows_K.device) * tokens
        return cls(
            rows_K,
            first_K,
            ends_B=torch.searchsorted(rows_K, borders_B, out_int32=True),
            until_K=torch.searchsorted(first_K, rows_K, out_int32=True, right=True),
            windowed=starts_K is not None,
        )

    def sizes(self) -> list[tuple[Tensor, tuple[int, ...]]]:
        """Its tensors, each with the dims whose size follows from the number of rows."""
        return [(tensor, (0,)) for tensor in (self.rows_K, self.first_K, self.until_K)]


class Attended(NamedTuple):
    """What causal attention gave all tokens: with it, rows among them need no attention but its gradient."""

    y_NHE: Tensor
    logsumexp_NH: Tensor
    """float32: logarithm (base 2) of the sum of exponentials."""


def attend_all(q_BHTE: Tensor, k_BJTE: Tensor, v_BJTE: Tensor) -> Attended | None:
    """Causal attention of all tokens without a graph, or None where attend_rows could not use what it gives: outside
    of CUDA, and in types other than 16-bit floating point, where its kernels are the slower ones."""
    if not q_BHTE.is_cuda or q_BHTE.itemsize != 2 or not q_BHTE.dtype == k_BJTE.dtype == v_BJTE.dtype:
        return None
    return Attended(*fused_attend_all(q_BHTE, k_BJTE, v_BJTE, q_BHTE.shape[-1] ** -0.5))


def attend_rows(
    q_HKE: Tensor,
    k_BJTE: Tensor,
    v_BJTE: Tensor,
    layout: Layout,
    own_JKE: tuple[Tensor, Tensor] | None = None,
    known: Attended | None = None,
    scale: float | None = None,
) -> Tensor:
    """What each row gathers from the keys that it sees, H x K x E.

    q_HKE, k_BJTE, v_BJTE: of one type, float32, bfloat16 or float16 (under autocast all are cast to its type), strided
    as one likes. own_JKE: keys and values of the rows themselves, equal to those in k_BJTE and v_BJTE up to rounding;
    given, the gradient of keys and values goes to them and to none else; not given, it goes to k_BJTE and v_BJTE.
    known: what attend_all gave for the queries of all tokens, and then no row may have a window. scale: of the logits,
    1 / sqrt(E) if not given. On CUDA the same input gives the same bits, and float32 products run on tensor cores in
    three parts (error about 1e-6).

    Raises ValueError when shapes or types do not fit.
    """
    (H, K, E), (B, J, T, _) = q_HKE.shape, k_BJTE.shape
    own = () if own_JKE is None else own_JKE
    if k_BJTE.shape != (B, J, T, E) or v_BJTE.shape != k_BJTE.shape or any(x.shape != (J, K, E) for x in own) or H % J:
        raise ValueError(
            f"attend_rows: queries {tuple(q_HKE.shape)}, keys {tuple(k_BJTE.shape)}, values {tuple(v_BJTE.shape)}, own "
            f"{[tuple(x.shape) for x in own]} must be (H, K, E), twice (B, J, T, E) and (J, K, E), H a multiple of J"
        )
    if E > WIDEST_HEAD:
        raise ValueError(f"attend_rows: heads are {E} wide; give at most {WIDEST_HEAD}")
    if scale is None:
        scale = E**-0.5
    device = q_HKE.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q_HKE, k_BJTE, v_BJTE = q_HKE.to(dtype), k_BJTE.to(dtype), v_BJTE.to(dtype)
        own_JKE = own_JKE and (own_JKE[0].to(dtype), own_JKE[1].to(dtype))
    if not q_HKE.is_cuda:
        return reference.attend_rows(q_HKE, k_BJTE, v_BJTE, layout, own_JKE, scale)
    if q_HKE.dtype != k_BJTE.dtype or k_BJTE.dtype != v_BJTE.dtype or q_HKE.dtype.itemsize > 4:
        raise ValueError(
            f"attend_rows: queries are {q_HKE.dtype}, keys {k_BJTE.dtype}, values {v_BJTE.dtype}; give all as float32, "
            "bfloat16 or float16"
        )
    if own_JKE is not None:
        k_BJTE, v_BJTE = k_BJTE.detach(), v_BJTE.detach()
    own_k_JKE, own_v_JKE = own_JKE or (None, None)
    y_KHE, _ = fused_attend_rows(
        q_HKE, k_BJTE, v_BJTE, own_k_JKE, own_v_JKE, *(known or (None, None)),
        layout.rows_K, layout.first_K, layout.ends_B, layout.until_K, scale, layout.windowed,
    )  # fmt: skip
    y_HKE: Tensor = y_KHE.transpose(0, 1)
    return y_HKE
