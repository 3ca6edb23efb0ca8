"""The kernels as operators of PyTorch, which compiled code calls without looking inside, and their gradient.

Shapes: as in `kernels.scan.triton`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("pylon::scan", mutates_args=())
def scan(
    values_BTHP: Tensor,
    steps_BTH: Tensor,
    decays_BTH: Tensor,
    write_BTGN: Tensor,
    read_BTGN: Tensor,
    state_BHNP: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the state after the last token, and for the gradient alone the states that enter the chunks."""
    from pylon_trainer.kernels.scan import launch

    return launch.forward(values_BTHP, steps_BTH, decays_BTH, write_BTGN, read_BTGN, state_BHNP)


@torch.library.custom_op("pylon::scan_backward", mutates_args=())
def _scan_backward(
    d_y_BTHP: Tensor,
    d_final_BHNP: Tensor | None,
    values_BTHP: Tensor,
    steps_BTH: Tensor,
    decays_BTH: Tensor,
    write_BTGN: Tensor,
    read_BTGN: Tensor,
    states_BCHNP: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of values, steps, decays, write, read and of the state before the first token."""
    from pylon_trainer.kernels.scan import launch

    return launch.backward(
        d_y_BTHP, d_final_BHNP, values_BTHP, steps_BTH, decays_BTH, write_BTGN, read_BTGN, states_BCHNP
    )


@scan.register_fake
def _(
    values_BTHP: Tensor,
    steps_BTH: Tensor,
    decays_BTH: Tensor,  # noqa: ARG001
    write_BTGN: Tensor,
    read_BTGN: Tensor,  # noqa: ARG001
    state_BHNP: Tensor | None,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    from pylon_trainer.kernels.scan import launch

    (B, T, H, P), N = values_BTHP.shape, write_BTGN.shape[3]
    chunk_tokens = launch.choose_tilings(values_BTHP, write_BTGN).chunk_tokens
    states_BCHNP = values_BTHP.new_empty(B, (T + chunk_tokens - 1) // chunk_tokens, H, N, P)
    return values_BTHP.new_empty(B, T, H, P), steps_BTH.new_empty(B, H, N, P), states_BCHNP


@_scan_backward.register_fake
def _(
    d_y_BTHP: Tensor,  # noqa: ARG001
    d_final_BHNP: Tensor | None,  # noqa: ARG001
    values_BTHP: Tensor,
    steps_BTH: Tensor,
    decays_BTH: Tensor,
    write_BTGN: Tensor,
    read_BTGN: Tensor,
    states_BCHNP: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, _, H, N, P = states_BCHNP.shape
    d_values, d_steps, d_decays, d_write, d_read = (
        x.new_empty(x.shape) for x in (values_BTHP, steps_BTH, decays_BTH, write_BTGN, read_BTGN)
    )
    return d_values, d_steps, d_decays, d_write, d_read, steps_BTH.new_empty(B, H, N, P)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, state_BHNP = inputs
    _, _, states_BCHNP = output
    ctx.save_for_backward(*tensors, states_BCHNP)
    ctx.continues = state_BHNP is not None
    ctx.set_materialize_grads(False)  # or the states, which get none, would be given zeros


def _backward(
    ctx: Any, d_y_BTHP: Tensor | None, d_final_BHNP: Tensor | None, d_states_BCHNP: None
) -> tuple[Tensor | None, ...]:
    assert d_states_BCHNP is None, "nobody else sees them"
    values_BTHP = ctx.saved_tensors[0]
    if d_y_BTHP is None:
        d_y_BTHP = torch.zeros_like(values_BTHP)
    *gradients, d_state_BHNP = _scan_backward(d_y_BTHP, d_final_BHNP, *ctx.saved_tensors)
    return *gradients, d_state_BHNP if ctx.continues else None


scan.register_autograd(_backward, setup_context=_save)
