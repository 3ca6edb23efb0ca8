"""Attention of scattered rows, forward and backward, beside attention of all rows and beside masked attention of some.

    python benchmarks/row_attention.py

`full` is PyTorch's attention of all rows, by the faster of its two flash backends. `masked` puts the rows of each
sequence side by side, padded to the longest, as queries of PyTorch's attention under a mask; it is told the lengths for
free, which a training step could not know without waiting for the device. `backward` sends gradients to the queries and
to the rows' own keys and values, `dense_backward` and the others to the keys and values of all."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from measure import both_ways_ms, publish, results_directory
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pylon_trainer.kernels.attention import Layout, attend_rows

SHAPES = {"1.17B": (8, 2048, 16, 16, 128), "135M": (32, 2048, 9, 3, 64)}
RATIOS = [0.5, 0.25, 0.125]
FLASH_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]


def full_times(q_BHTE: Tensor, k_BJTE: Tensor, v_BJTE: Tensor) -> tuple[float, float]:
    def attend() -> Tensor:
        return F.scaled_dot_product_attention(q_BHTE, k_BJTE, v_BJTE, is_causal=True, enable_gqa=True)

    measured = []
    for backend in FLASH_BACKENDS:
        with sdpa_kernel(backend):
            measured.append(both_ways_ms(attend, q_BHTE, k_BJTE, v_BJTE))
    return min(measured, key=sum)


def padded(rows_K: Tensor, sequences: int, tokens: int) -> Tensor:
    """B x C: the chosen tokens of each sequence, then its last token as often as needed."""
    per_sequence = [rows_K[rows_K // tokens == b] % tokens for b in range(sequences)]
    return torch.nn.utils.rnn.pad_sequence(per_sequence, batch_first=True, padding_value=tokens - 1)


def measure(shape: str, ratio: float) -> dict[str, Any]:
    B, T, H, J, E = SHAPES[shape]
    q_BHTE = torch.randn(B, H, T, E, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k_BJTE, v_BJTE = (
        torch.randn(B, J, T, E, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2)
    )
    rows_K = torch.randperm(B * T, device="cuda")[: int(B * T * ratio)].sort().values
    layout = Layout.of(rows_K, None, B, T)
    q_HKE, own_k_JKE, own_v_JKE = (
        x_BHTE.detach().transpose(0, 1).flatten(1, 2)[:, rows_K].requires_grad_() for x_BHTE in (q_BHTE, k_BJTE, v_BJTE)
    )
    forward_ms, backward_ms = both_ways_ms(
        lambda: attend_rows(q_HKE, k_BJTE, v_BJTE, layout, (own_k_JKE, own_v_JKE)), q_HKE, own_k_JKE, own_v_JKE
    )
    _, dense_backward_ms = both_ways_ms(lambda: attend_rows(q_HKE, k_BJTE, v_BJTE, layout), q_HKE, k_BJTE, v_BJTE)

    t_BC = padded(rows_K, B, T)
    q_BHCE = q_BHTE.detach().gather(2, t_BC[:, None, :, None].expand(-1, H, -1, E)).requires_grad_()
    mask_B1CT = (torch.arange(T, device="cuda") <= t_BC[:, :, None]).unsqueeze(1)
    leaves = q_BHCE, k_BJTE, v_BJTE
    masked = both_ways_ms(
        lambda: F.scaled_dot_product_attention(*leaves, attn_mask=mask_B1CT, enable_gqa=True), *leaves
    )
    full = full_times(q_BHTE, k_BJTE, v_BJTE)
    return {
        "shape": shape,
        "ratio": ratio,
        "forward_ms": forward_ms,
        "backward_ms": backward_ms,
        "dense_backward_ms": dense_backward_ms,
        "full_forward_ms": full[0],
        "full_backward_ms": full[1],
        "masked_forward_ms": masked[0],
        "masked_backward_ms": masked[1],
        "speedup_vs_full": sum(full) / (forward_ms + backward_ms),
    }


def main() -> None:
    directory = results_directory("Measure attention of scattered rows.")
    publish("row_attention", [measure(shape, ratio) for shape in SHAPES for ratio in RATIOS], directory)


if __name__ == "__main__":
    main()
