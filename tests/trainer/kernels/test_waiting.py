from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pylon_trainer.kernels import bucket, head, score


@pytest.fixture
def _waiting_is_an_error() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.usefixtures("_waiting_is_an_error")
def test_a_gated_step_never_waits_for_the_device() -> None:
    hidden_NH = torch.randn(512, 64, device="cuda", requires_grad=True)
    weight_VH = torch.randn(999, 64, device="cuda", requires_grad=True)
    labels_N = torch.arange(512, device="cuda")
    scores = head.score(hidden_NH, weight_VH, labels_N)
    bucket.bucket(scores.gradient_norm_N, (128, 256))
    rows_K, weights_K = torch.arange(0, 512, 4, device="cuda"), torch.ones(128, device="cuda")
    head.selected_cross_entropy(hidden_NH, weight_VH, labels_N, rows_K, weights_K, scores).backward()
    score.score(hidden_NH @ weight_VH.T, labels_N)
    head.loss_gradients(hidden_NH, weight_VH, labels_N, torch.ones(512, device="cuda"))
    head.poison(scores.take(rows_K).nonfinite_rows)
