"""The state-space dual (models/resonate/scan.py, whose `chunked_scan` is the reference) as Triton kernels, with
gradients.

Per token and head it reads and writes, in the type of the values, 5 P numbers forward and 11 P backward when states
have as many numbers as chunks have tokens. For the gradient it holds its inputs and the states that enter chunks, as
many numbers as the values then; no head's scores ever leave a multiprocessor. `write` and `read` are never repeated for
the heads that share them. It runs on CUDA only, and the host never waits for it.

Shapes: as in models/resonate/scan.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pylon_trainer.kernels.scan.operators import scan as fused_scan

__all__ = ["LARGEST_STATE", "scan"]

LARGEST_STATE = 256
FORGET = -128.0
"""Logarithm of a decay that leaves nothing: its exponential is 0 in float32, as is everything below. Decays go no
lower, because a sum over a chunk keeps digits for what is small only while it is not large itself."""


def scan(
    values_BTHP: Tensor,
    steps_BTH: Tensor,
    poles_H: Tensor,
    write_BTGN: Tensor,
    read_BTGN: Tensor,
    *,
    starts_BT: Tensor | None = None,
    state_BHNP: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As chunked_scan has it, but for the length of a chunk, which is the kernels' own.

    values, write, read: of one type, float32, bfloat16 or float16, strided as one likes. The same input gives the same
    bits, and float32 products run on tensor cores in three parts (error about 1e-6).

    Raises ValueError when shapes or types do not fit.
    """
    (B, T, H, _), (_, _, G, N) = values_BTHP.shape, write_BTGN.shape
    if write_BTGN.shape[:2] != (B, T) or read_BTGN.shape != write_BTGN.shape or steps_BTH.shape != (B, T, H) or H % G:
        raise ValueError(
            f"scan: values {tuple(values_BTHP.shape)}, steps {tuple(steps_BTH.shape)}, write {tuple(write_BTGN.shape)} "
            f"and read {tuple(read_BTGN.shape)} must be (B, T, H, P), (B, T, H), twice (B, T, G, N), H a multiple of G"
        )
    if N > LARGEST_STATE:
        raise ValueError(f"scan: states have {N} numbers per channel; give at most {LARGEST_STATE}")
    types = {values_BTHP.dtype, write_BTGN.dtype, read_BTGN.dtype}
    if len(types) > 1 or values_BTHP.dtype.itemsize > 4:
        raise ValueError(
            f"scan: values are {values_BTHP.dtype}, write {write_BTGN.dtype}, read {read_BTGN.dtype}; give all as "
            "float32, bfloat16 or float16"
        )
    decays_BTH = (steps_BTH * poles_H).clamp_min(FORGET)
    if starts_BT is not None:
        begins_BT = starts_BT == torch.arange(T, device=starts_BT.device)
        decays_BTH = torch.where(begins_BT.unsqueeze(-1), FORGET, decays_BTH)
    y_BTHP, final_BHNP, _ = fused_scan(values_BTHP, steps_BTH, decays_BTH, write_BTGN, read_BTGN, state_BHNP)
    return y_BTHP, final_BHNP
