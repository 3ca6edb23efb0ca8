from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch

from pylon_trainer.kernels import attention, bucket, head, score


@pytest.mark.gpu
def test_a_gated_step_never_waits_for_the_device(waiting_is_an_error: AbstractContextManager[None]) -> None:
    hidden_NH = torch.randn(512, 64, device="cuda", requires_grad=True)
    weight_VH = torch.randn(999, 64, device="cuda", requires_grad=True)
    labels_N = torch.arange(512, device="cuda")
    rows_K, weights_K = torch.arange(0, 512, 4, device="cuda"), torch.ones(128, device="cuda")
    with waiting_is_an_error:
        scores = head.score(hidden_NH, weight_VH, labels_N)
        bucket.bucket(scores.gradient_norm_N, (128, 256))
        head.selected_cross_entropy(hidden_NH, weight_VH, labels_N, rows_K, weights_K, scores).backward()
        score.score(hidden_NH @ weight_VH.T, labels_N)
        head.loss_gradients(hidden_NH, weight_VH, labels_N, torch.ones(512, device="cuda"))
        head.poison(scores.take(rows_K).nonfinite_rows)


@pytest.mark.gpu
def test_attention_of_rows_never_waits_for_the_device(waiting_is_an_error: AbstractContextManager[None]) -> None:
    q_HKE, own_k, own_v = (torch.randn(2, 90, 64, device="cuda", requires_grad=True) for _ in range(3))
    k_BJTE, v_BJTE = (torch.randn(2, 2, 128, 64, device="cuda", requires_grad=True) for _ in range(2))
    with waiting_is_an_error:
        layout = attention.Layout.of(torch.arange(30, 120, device="cuda"), None, sequences=2, tokens=128)
        attention.attend_rows(q_HKE, k_BJTE, v_BJTE, layout, (own_k, own_v)).sum().backward()
        attention.attend_rows(q_HKE, k_BJTE, v_BJTE, layout).sum().backward()
