"""A gated Hugging Face model gives the gradients of the model itself, cut where rows were not chosen."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import FAMILIES, LENGTH, SEQUENCES, batch_of, cut_attention, gradients, model_of
from torch import Tensor
from transformers.models.llama import modeling_llama

import pylon_trainer.huggingface as pylon
from pylon_trainer.gating.gate import Gate

BATCHES = ["plain", "ignored", "right padded", "left padded", "packed", "counted", "shifted"]
ALL = 0.9999
"""A ratio that keeps every row and yet is no plain step."""


def enable(model: Any, ratio: float, **options: Any) -> Any:
    return pylon.enable(model, ratio_control="Fixed", token_ratio=ratio, **options)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What gates choose, as they choose it."""
    selections: list[Any] = []
    choose = Gate.choose

    def spy(*args: Any) -> Any:
        selections.append(choose(*args))
        return selections[-1]

    monkeypatch.setattr(Gate, "choose", spy)
    return selections


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", BATCHES)
def test_all_rows_give_the_models_own_loss_and_gradients(family: str, kind: str) -> None:
    model, batch = model_of(family), batch_of(kind)
    expected = model(**batch)
    expected.loss.backward()
    expected_gradients = gradients(model)
    model.zero_grad()

    enable(model, ALL)
    actual = model(**batch)
    actual.loss.backward()

    assert actual.logits is None  # so it was gated
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert_same(gradients(model), expected_gradients)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["plain", "left padded", "packed"])
@pytest.mark.parametrize("activations", ["Keep", "Recompute"])
def test_chosen_rows_give_the_gradients_of_a_dense_pass_that_is_cut(
    family: str, kind: str, activations: str, chosen: list[Any]
) -> None:
    model, batch = model_of(family), batch_of(kind)
    enable(model, 0.4, row_activations=activations)
    model(**batch).loss.backward()
    actual = gradients(model)
    model.zero_grad()
    pylon.disable(model)

    [selection] = chosen
    chosen_N = torch.zeros(SEQUENCES * LENGTH, dtype=torch.bool)
    chosen_N[selection.rows_K] = True
    with cut_attention(model, chosen_N.view(SEQUENCES, LENGTH)):
        logits_NV = model(**{name: x for name, x in batch.items() if name != "labels"}).logits.flatten(0, 1)
    labels_N = F.pad(batch["labels"][:, 1:], (0, 1), value=-100).flatten()
    losses_K = F.cross_entropy(logits_NV, labels_N, reduction="none")[selection.rows_K]
    ((losses_K * selection.weights_K).sum() / (labels_N != -100).sum()).backward()

    assert chosen_N.sum() == 15
    assert_same(actual, gradients(model))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("activations", ["Keep", "Recompute"])
def test_dense_gradients_of_keys_and_values_are_exact_in_the_highest_layer(
    family: str, activations: str, chosen: list[Any]
) -> None:
    model, batch = model_of(family), batch_of()
    enable(model, 0.4, kv_gradient="Dense", row_activations=activations)
    model(**batch).loss.backward()
    actual = gradients(model)
    model.zero_grad()
    pylon.disable(model)
    labels_BT = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    losses_BT = F.cross_entropy(model(batch["input_ids"]).logits.transpose(1, 2), labels_BT, reduction="none")
    [selection] = chosen
    weighted_K = losses_BT.flatten()[selection.rows_K] * selection.weights_K
    (weighted_K.sum() / (labels_BT != -100).sum()).backward()
    highest = {name: gradient for name, gradient in gradients(model).items() if ".2." in name}
    assert len(highest) >= 9
    assert_same({name: actual[name] for name in highest}, highest)


def test_the_loss_that_is_reported_is_that_of_all_tokens() -> None:
    model, batch = model_of(), batch_of()
    expected = model(**batch).loss
    enable(model, 0.25)
    torch.testing.assert_close(model(**batch).loss, expected)


def test_a_scaled_loss_scales_the_gradients() -> None:
    model, batch = model_of(), batch_of()
    enable(model, 0.5, selection="Top")
    model(**batch).loss.backward()
    once = gradients(model)
    model.zero_grad()
    (3 * model(**batch).loss).backward()
    assert_same(gradients(model), {name: 3 * gradient for name, gradient in once.items()})


def test_no_label_at_all_gives_zero_and_no_nan() -> None:
    model, batch = model_of(), batch_of()
    enable(model, 0.5)
    batch["labels"].fill_(-100)
    loss = model(**batch).loss
    loss.backward()
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients(model).values())


def test_no_item_in_the_whole_batch_gives_zero_and_no_nan() -> None:
    model, batch = model_of(), batch_of("counted")
    enable(model, 0.5)
    batch["labels"].fill_(-100)
    for items in (0, torch.tensor(0)):
        assert model(**batch | {"num_items_in_batch": items}).loss == 0


def test_labels_of_padding_at_the_end_count_as_the_model_counts_them() -> None:
    model, batch = model_of(), batch_of("right padded")
    batch["labels"] = batch["input_ids"]
    enable(model, 0.5)
    assert model(**batch).label_mask.all()


def test_a_micro_batch_with_a_logit_that_is_no_number_adds_nothing_and_is_told() -> None:
    model, batch = model_of(), batch_of()
    enable(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model(**batch).loss.backward()
    expected = gradients(model)
    weight_VD = model.lm_head.weight.data
    usual_V = weight_VD[:, 0].clone()
    weight_VD[:, 0] = torch.inf
    assert not model(**batch).loss.isfinite()
    model(**batch).loss.backward()
    assert_same(gradients(model), expected)
    weight_VD[:, 0] = usual_V
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(40):
            optimizer.step()
            model(**batch).loss.backward()
    assert ["NaN or infinite" in str(warning.message) for warning in told] == [True]


def test_a_frozen_base_gets_no_gradients() -> None:
    model, batch = model_of(), batch_of()
    model.requires_grad_(False)
    model.model.layers[1].mlp.requires_grad_(True)
    model(**batch).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    enable(model, ALL)
    model(**batch).loss.backward()
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_under_autocast_the_gradients_are_those_of_the_model_up_to_rounding(family: str) -> None:
    model, batch = model_of(family, initializer_range=0.1), batch_of()
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    enable(model, ALL)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    for name, gradient in gradients(model).items():
        assert gradient.dtype is torch.float32
        similarity = F.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0)
        assert similarity > 0.99, name


def test_a_kernel_that_rotates_in_place_spoils_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_of(), batch_of()
    model(**batch).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    usual = modeling_llama.apply_rotary_pos_emb

    def in_place(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        rotated = usual(q, k, cos, sin)
        for x, value in zip((q, k), rotated, strict=True):
            x.data.copy_(value.detach())
        return rotated

    in_place.__module__ = "liger_kernel.transformers.rope"
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", in_place)
    enable(model, ALL)
    model(**batch).loss.backward()
    assert_same(gradients(model), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gpt2"])
@pytest.mark.parametrize("kind", ["plain", "left padded", "packed"])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_on_a_gpu_all_rows_give_the_models_own_gradients(family: str, kind: str, bfloat16: bool) -> None:
    sizes = {"n_embd": 64} if family == "gpt2" else {"hidden_size": 64, "head_dim": 16}
    model = model_of(family, initializer_range=0.1, **sizes).cuda()
    batch = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in batch_of(kind).items()}

    def step() -> dict[str, Tensor]:
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=bfloat16):
            loss = model(**batch).loss
        loss.backward()
        return gradients(model)

    expected = step()
    enable(model, ALL)
    actual = step()
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        distance = (actual[name] - gradient).norm() / gradient.norm().clamp_min(1e-6)
        assert distance < (0.05 if bfloat16 else 1e-3), name
