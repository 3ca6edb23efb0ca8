"""Which implementation runs the scan: one turn of the recurrence, Triton kernels (kernels/scan), or PyTorch's own.

Shapes: as scan.py.
"""

from __future__ import annotations

from torch import Tensor

from pylon_api.training import ScanKernel
from pylon_trainer.kernels.scan import scan as triton_scan
from pylon_trainer.models.resonate.scan import chunked_scan, scan_token


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
    inputs = values_BTHP, steps_BTH, poles_H, write_BTGN, read_BTGN
    if kernel is ScanKernel.AUTO and values_BTHP.is_cuda:
        return triton_scan(*inputs, starts_BT=starts_BT, state_BHNP=state_BHNP)
    return chunked_scan(*inputs, chunk_tokens=chunk_tokens, starts_BT=starts_BT, state_BHNP=state_BHNP)
