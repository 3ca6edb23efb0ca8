"""Scoring of logits: bytes per second beside the device's copy ceiling, the published kernel and compiled PyTorch.

    python benchmarks/score_kernel.py

The published kernel is that of `cggr` 0.5.0 on PyPI (`pip install --no-deps cggr==0.5.0`); without it its columns are
null."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from measure import copy_bytes_per_s, milliseconds, publish, results_directory
from torch import Tensor

from pylon_trainer.kernels import score

SHAPES = [
    (16384, 49152, torch.bfloat16),
    (16384, 49152, torch.float16),
    (16384, 49152, torch.float32),
    (16384, 50257, torch.bfloat16),
    (16384, 128256, torch.bfloat16),
    (8192, 200005, torch.bfloat16),
    (2048, 49152, torch.bfloat16),
    (65536, 8192, torch.bfloat16),
]


def published_score() -> Callable[[Tensor, Tensor], object] | None:
    """The kernel itself: its public wrapper would fall back to PyTorch in silence."""
    if importlib.util.find_spec("triton_kernels") is None:
        return None
    from triton_kernels import _triton_difficulty_score

    return lambda logits_NV, labels_N: _triton_difficulty_score(logits_NV, labels_N, "combined")


@torch.compile(dynamic=False)
def compiled_score(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, ...]:
    """The same six scores as a person would write them for the compiler: a second maximum by masking instead of a
    top-k."""
    logits_NV = logits_NV.float()
    logsumexp_N = torch.logsumexp(logits_NV, 1)
    log_p_NV = logits_NV - logsumexp_N[:, None]
    p_NV = log_p_NV.exp()
    confidence_N = p_NV.amax(1)
    second_N = p_NV.masked_fill(p_NV == confidence_N[:, None], 0.0).amax(1)
    loss_N = -log_p_NV.gather(1, labels_N[:, None]).squeeze(1)
    gradient_norm_N = torch.sqrt((p_NV * p_NV).sum(1) - 2 * torch.exp(-loss_N) + 1)
    return -(p_NV * log_p_NV).sum(1), confidence_N - second_N, loss_N, confidence_N, logsumexp_N, gradient_norm_N


def measure(tokens: int, vocab: int, dtype: torch.dtype, copy: float) -> dict[str, Any]:
    torch._dynamo.reset()
    published = published_score()
    logits_NV = (torch.randn(tokens, vocab, device="cuda") * 3).to(dtype)
    labels_N = torch.randint(vocab, (tokens,), device="cuda")
    ours_ms = milliseconds(lambda: score.score(logits_NV, labels_N))
    compiled_ms = milliseconds(lambda: compiled_score(logits_NV, labels_N))
    published_ms = None if published is None else milliseconds(lambda: published(logits_NV, labels_N))
    bytes_per_s = logits_NV.nbytes / (ours_ms / 1e3)
    return {
        "rows": tokens,
        "vocab": vocab,
        "dtype": str(dtype).removeprefix("torch."),
        "milliseconds": ours_ms,
        "bytes_per_s": bytes_per_s,
        "copy_bytes_per_s": copy,
        "copy_fraction": bytes_per_s / copy,
        "published_milliseconds": published_ms,
        "speedup_vs_published": None if published_ms is None else published_ms / ours_ms,
        "compiled_milliseconds": compiled_ms,
        "speedup_vs_compiled": compiled_ms / ours_ms,
    }


def main() -> None:
    directory = results_directory("Measure the scoring kernel.")
    copy = copy_bytes_per_s()
    publish("score_kernel", [measure(*shape, copy) for shape in SHAPES], directory)


if __name__ == "__main__":
    main()
