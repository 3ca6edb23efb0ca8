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

    y, values, gate: each of a type of its own, strided as one likes. epsilon: positive, joins the mean square.
    Gradients reach all five tensors. Sums are float32 at least, on CUDA float32, and there the same input gives the
    same bits.

    Raises ValueError when shapes do not fit, and for float64 on CUDA.
    """
    y, values, skip, gate, weight = (tuple(x.shape) for x in (y_BTO, values_BTO, skip_H, gate_BTO, weight_O))
    (heads, channels), lengths = (skip_H.numel(), weight_O.numel()), gate[:2]
    shapes_fit = y == values == gate == (*lengths, channels) and (skip, weight) == ((heads,), (channels,))
    if not shapes_fit or channels % heads or channels % groups:
        raise ValueError(
            f"gated norm: y {y}, values {values}, skip {skip}, gate {gate} and weight {weight} must be (B, T, O), "
            f"(B, T, O), (H,), (B, T, O) and (O,), with O a multiple of H and of the {groups} groups"
        )
    if gate_BTO.is_cuda and max(x.itemsize for x in (y_BTO, values_BTO, gate_BTO)) > 4:
        raise ValueError(
            f"gated norm: y is {y_BTO.dtype}, values are {values_BTO.dtype}, the gate is {gate_BTO.dtype}; "
            "give float32, bfloat16 or float16"
        )
    # Elsewhere PyTorch's own operations, which a compiled block fuses with what surrounds them.
    run = operators.gated_norm if gate_BTO.is_cuda else reference.gated_norm
    normed_BTO: Tensor = run(y_BTO, values_BTO, skip_H, gate_BTO, weight_O, groups, epsilon)
    return normed_BTO
