"""Which implementation runs the scan: ours in PyTorch, or the Triton kernels of flash-linear-attention.

The recurrence is that package's "simple GLA" (gated linear attention with one decay per head) with `read` for queries,
`write` for keys, step * values for values and scale 1 (`fla.ops.simple_gla.chunk_simple_gla`). It knows no documents
without a look at their lengths on the host, so a document begins with a decay of e^FORGET in place of 0. A compiled
block takes ours, which torch.compile fuses with what surrounds it; it would have to leave its graph for theirs.

Shapes: as scan.py.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from pylon_api.training import ScanKernel
from pylon_trainer.models.resonate.scan import chunked_scan, scan_token

FORGET = -64.0
"""Logarithm of what is left of a state in another document: 1.6e-28. Larger ones would cost digits of the sums of
logarithms, from whose differences the kernels take their decays."""

HAS_TRITON_SCAN = importlib.util.find_spec("fla") is not None


def scan(
    values_BTHP: Tensor,
    steps_BTH: Tensor,
    poles_H: Tensor,
    write_BTGN: Tensor,
    read_BTGN: Tensor,
    *,
    chunk_tokens: int,
    kernel: ScanKernel,
    starts_BT: Tensor | None = None,
    state_BHNP: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As chunked_scan has it, in whatever way is fastest here."""
    if values_BTHP.shape[1] == 1 and state_BHNP is not None:
        y_BHP, state_BHNP = scan_token(
            values_BTHP[:, 0], steps_BTH[:, 0], poles_H, write_BTGN[:, 0], read_BTGN[:, 0], state_BHNP
        )
        return y_BHP.unsqueeze(1).to(values_BTHP.dtype), state_BHNP
    may_leave = kernel is ScanKernel.AUTO and not torch.compiler.is_compiling()
    if may_leave and HAS_TRITON_SCAN and values_BTHP.is_cuda:
        return triton_scan(
            values_BTHP, steps_BTH, poles_H, write_BTGN, read_BTGN, starts_BT=starts_BT, state_BHNP=state_BHNP
        )
    return chunked_scan(
        values_BTHP,
        steps_BTH,
        poles_H,
        write_BTGN,
        read_BTGN,
        chunk_tokens=chunk_tokens,
        starts_BT=starts_BT,
        state_BHNP=state_BHNP,
    )


def triton_scan(
    values_BTHP: Tensor,
    steps_BTH: Tensor,
    poles_H: Tensor,
    write_BTGN: Tensor,
    read_BTGN: Tensor,
    *,
    starts_BT: Tensor | None = None,
    state_BHNP: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As chunked_scan has it, but for the length of a chunk, which is the kernels' own. CUDA only, and needs `fla`."""
    from fla.ops.simple_gla import chunk_simple_gla  # takes seconds, and most runs never need it

    decays_BTH = steps_BTH * poles_H
    if starts_BT is not None:
        begins_BT = starts_BT == torch.arange(starts_BT.shape[1], device=starts_BT.device)
        decays_BTH = torch.where(begins_BT.unsqueeze(-1), FORGET, decays_BTH)
    share = values_BTHP.shape[2] // write_BTGN.shape[2]
    y_BTHP, final_BHNP = chunk_simple_gla(
        q=read_BTGN.repeat_interleave(share, 2),
        k=write_BTGN.repeat_interleave(share, 2),
        v=(values_BTHP * steps_BTH.unsqueeze(-1)).to(values_BTHP.dtype),
        g=decays_BTH,
        scale=1.0,
        initial_state=state_BHNP,
        output_final_state=True,
    )
    return y_BTHP, final_BHNP
