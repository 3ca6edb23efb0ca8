"""What a mixer does with what its tokens heard: a share of each head's values joins it, then a gate and a norm.

Compiled, it is several passes over memory each way, with products in float32 between them; as a kernel it is one, which
holds nothing for the way back but its inputs.

Shapes: B sequences, T tokens, O channels, H heads of P = O / H of them each, G groups of W = O / G of them.
"""

from __future__ import annotations

from torch import Tensor

from pylon_trainer.kernels.gated_norm import operators, reference

__all__ = ["gated_norm"]


def gated_norm(
    y_BTO: Tensor,
    values_BTO: Tensor,
    skip_H: Tensor,
    gate_BTO: Tensor,
    weight_O: Tensor,
    *,
    groups: int,
    epsilon: float,
) -> Tensor:
    """weight * RMS norm, group by group, of (y + skip * values) * silu(gate), in the type of the gate.

    y, values, gate: each of a type of its own, strided as one likes. epsilon: positive, joins the mean square. Gradients
    reach all five, in their types. Sums are float32 at least, on CUDA float32, and there the same input gives the same
    bits.

    Raises ValueError when shapes do not fit, and for float64 on CUDA.
    """
    shape, heads, channels = tuple(gate_BTO.shape), skip_H.numel(), weight_O.numel()
    if (
        not shape == tuple(y_BTO.shape) == tuple(values_BTO.shape) == (*shape[:2], channels)
        or skip_H.shape != (heads,)
        or weight_O.shape != (channels,)
        or channels % heads
        or channels % groups
    ):
        raise ValueError(
            f"gated norm: y {tuple(y_BTO.shape)}, values {tuple(values_BTO.shape)}, gate {shape}, skip "
            f"{tuple(skip_H.shape)} and weight {tuple(weight_O.shape)} must be (B, T, O) three times, (H,) and (O,), O a "
            f"multiple of H and of the {groups} groups"
        )
    types = y_BTO.dtype, values_BTO.dtype, gate_BTO.dtype
    if gate_BTO.is_cuda and max(dtype.itemsize for dtype in types) > 4:
        raise ValueError(
            f"gated norm: y, values and gate are {', '.join(map(str, types))}; give float32, bfloat16 or float16"
        )
    # Elsewhere PyTorch's own operations, which a compiled block fuses with what surrounds them.
    run = operators.gated_norm if gate_BTO.is_cuda else reference.gated_norm
    normed_BTO: Tensor = run(y_BTO, values_BTO, skip_H, gate_BTO, weight_O, groups, epsilon)
    return normed_BTO
