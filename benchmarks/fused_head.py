"""The output head without logits, beside cuBLAS's product alone, chunked products with scoring, and the plain loss.

    python benchmarks/fused_head.py

Scoring every row is compared with the bare product at the same shape, which writes its logits. Two training pairs are
loss and both gradients. Gated: scores of every row and gradients of a quarter of them, against compiled cross entropy
over materialised logits. Plain: all rows, against the three bare products, chunks of rows through autograd, and Liger's
fused linear cross entropy where liger_kernel is installed, with its own chunks and with the fewest that it can use."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from measure import milliseconds, peak_bytes, publish, results_directory
from torch import Tensor
from torch.nn import functional as F

from pylon_trainer.kernels import head, score

SHAPES = [(16384, 49152, 2048), (16384, 49152, 576), (16384, 128256, 2048), (16384, 32000, 4096), (16384, 50257, 768)]
CHUNK_ROWS = 4096
RATIO = 0.25
ALIGNED_VOCAB = 64


def chunked(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> None:
    """cuBLAS and the scoring kernel, some rows at a time."""
    logits_CV = hidden_NH.new_empty(CHUNK_ROWS, len(weight_VH))
    for start in range(0, len(hidden_NH), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        score.score(torch.mm(hidden_NH[rows], weight_VH.T, out=logits_CV), labels_N[rows])


@torch.compile(dynamic=False)
def materialised_loss(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
    return F.cross_entropy((hidden_NH @ weight_VH.T).float(), labels_N)


def with_gradients(loss: Callable[[], Tensor], *inputs: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(loss(), inputs)


def best_gemm_milliseconds(hidden_NH: Tensor, weight_VH: Tensor) -> float:
    """cuBLAS's product, as it is or with a padded vocabulary: rows of logits that begin unaligned slow it down."""
    padded_VH = F.pad(weight_VH, (0, 0, 0, -len(weight_VH) % ALIGNED_VOCAB))
    return min(milliseconds(lambda: hidden_NH @ weight_VH.T), milliseconds(lambda: hidden_NH @ padded_VH.T))


def products(hidden_NH: Tensor, weight_VH: Tensor) -> None:
    """What no loss and its gradients can do without: logits, gradient of hidden, gradient of weight."""
    logits_NV = hidden_NH @ weight_VH.T
    torch.mm(logits_NV, weight_VH)
    torch.mm(logits_NV.T, hidden_NH)


def chunked_cross_entropy(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> None:
    """torch's cross entropy and autograd, some rows at a time."""
    weight_VH = weight_VH.detach().requires_grad_()
    for start in range(0, len(hidden_NH), CHUNK_ROWS):
        leaf_CH = hidden_NH[start : start + CHUNK_ROWS].detach().requires_grad_()
        logits_CV = (leaf_CH @ weight_VH.T).float()
        F.cross_entropy(logits_CV, labels_N[start : start + CHUNK_ROWS], reduction="sum").backward()


def liger(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, chunk_factor: int) -> Callable[[], object]:
    """Liger's gradients, which its forward pass makes; the factor multiplies the rows of its chunks."""
    from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

    needs_grad = hidden_NH.detach().requires_grad_(), weight_VH.detach().requires_grad_()

    def forward() -> object:
        with torch.no_grad():
            return fused_linear_cross_entropy_forward(*needs_grad, labels_N, chunk_mem_const=chunk_factor)

    return forward


def plain_pair(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> dict[str, Any]:
    """Loss and gradients of every row, ours and others'."""
    padded_VH = F.pad(weight_VH, (0, 0, 0, -len(weight_VH) % ALIGNED_VOCAB))
    ones_N = torch.ones(len(hidden_NH), device="cuda")
    contenders: dict[str, Callable[[], object]] = {
        "plain": lambda: head.loss_gradients(hidden_NH, weight_VH, labels_N, ones_N),
        "chunked_cross_entropy": lambda: chunked_cross_entropy(hidden_NH, weight_VH, labels_N),
    }
    if importlib.util.find_spec("liger_kernel"):
        contenders["liger"] = liger(hidden_NH, weight_VH, labels_N, chunk_factor=1)
        contenders["liger_large_chunks"] = liger(hidden_NH, weight_VH, labels_N, chunk_factor=8)
    row: dict[str, Any] = {"products_milliseconds": milliseconds(lambda: products(hidden_NH, padded_VH))}
    for name, function in contenders.items():
        row[f"{name}_milliseconds"] = milliseconds(function)
        row[f"{name}_peak_bytes"] = peak_bytes(function)
    best = min(row[f"{name}_milliseconds"] for name in contenders if name != "plain")
    return row | {"plain_speedup_vs_best_other": best / row["plain_milliseconds"]}


def measure(tokens: int, vocab: int, hidden: int) -> dict[str, Any]:
    torch._dynamo.reset()
    hidden_NH = torch.randn(tokens, hidden, device="cuda").bfloat16().requires_grad_()
    weight_VH = (torch.randn(vocab, hidden, device="cuda") * 3 * hidden**-0.5).bfloat16().requires_grad_()
    labels_N = torch.randint(vocab, (tokens,), device="cuda")
    rows_K = torch.randperm(tokens, device="cuda")[: int(tokens * RATIO)]
    weights_K = torch.full((len(rows_K),), 1 / len(rows_K), device="cuda")
    plain = hidden_NH.detach(), weight_VH.detach()

    def selected_loss() -> Tensor:
        scores = head.score(hidden_NH, weight_VH, labels_N)
        return head.selected_cross_entropy(hidden_NH, weight_VH, labels_N, rows_K, weights_K, scores)

    def score_rows() -> object:
        return head.score(*plain, labels_N)

    gemm_ms = best_gemm_milliseconds(*plain)
    score_ms = milliseconds(score_rows)
    chunked_ms = milliseconds(lambda: chunked(*plain, labels_N))
    selected = with_gradients(selected_loss, hidden_NH, weight_VH)
    materialised = with_gradients(lambda: materialised_loss(hidden_NH, weight_VH, labels_N), hidden_NH, weight_VH)
    selected_ms, materialised_ms = milliseconds(selected), milliseconds(materialised)
    return {
        "rows": tokens,
        "vocab": vocab,
        "hidden": hidden,
        "fraction_of_gemm": gemm_ms / score_ms,
        "milliseconds": score_ms,
        "gemm_milliseconds": gemm_ms,
        "gemm_teraflops": 2 * tokens * vocab * hidden / gemm_ms / 1e9,
        "chunked_milliseconds": chunked_ms,
        "peak_bytes": peak_bytes(score_rows),
        "logits_bytes": 2 * tokens * vocab,
        "ratio": RATIO,
        "selected_milliseconds": selected_ms,
        "materialised_milliseconds": materialised_ms,
        "speedup_vs_materialised": materialised_ms / selected_ms,
        "selected_peak_bytes": peak_bytes(selected),
        "materialised_peak_bytes": peak_bytes(materialised),
        **plain_pair(*plain, labels_N),
    }


def main() -> None:
    directory = results_directory("Measure the fused head.")
    publish("fused_head", [measure(*shape) for shape in SHAPES], directory)


if __name__ == "__main__":
    main()
