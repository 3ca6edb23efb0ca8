"""CGGRModel trains on the hard part, and its router owns nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flops import flops
from tiny_models import FAMILIES, LENGTH, SEQUENCES, VOCABULARY, batch_of, gradients, model_of, tokens_of
from torch import Tensor

from pylon_trainer.cggr import CGGRModel, create_truncated_router
from pylon_trainer.errors import ConfigError

FIXED: dict[str, Any] = {"warmup_steps": 0, "dynamic_threshold": False}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_router_of_all_layers_is_the_model(family: str) -> None:
    model, tokens_BT = model_of(family), tokens_of()
    router = create_truncated_router(model, num_layers=3)
    torch.testing.assert_close(router(tokens_BT), model(tokens_BT).logits)
    shorter = create_truncated_router(model)
    assert shorter(tokens_BT).shape == (SEQUENCES, LENGTH, VOCABULARY)
    assert not torch.equal(shorter(tokens_BT), router(tokens_BT))


def test_a_router_shares_weights_and_adds_no_keys() -> None:
    model = model_of()
    keys = [f"model.{key}" for key in model.state_dict()]
    gated = CGGRModel(model)
    assert set(gated.state_dict()) == {"step_count", *keys}
    assert len(list(gated.parameters())) == len(list(model.parameters()))
    router = create_truncated_router(model)
    assert not router.state_dict()
    assert router.head_weight is model.lm_head.weight


@pytest.mark.parametrize("layers", [0, 4])
def test_a_router_of_layers_that_are_not_there_is_refused(layers: int) -> None:
    with pytest.raises(ConfigError, match=f"num_layers: {layers} of a model with 3 layers"):
        create_truncated_router(model_of(), num_layers=layers)


def test_the_hardest_sequences_by_the_router_are_those_that_train() -> None:
    model, tokens_BT = model_of(), tokens_of(sequences=4)
    easy = torch.tensor([True, False, True, False])

    def router(input_ids: Tensor, **_: Any) -> Tensor:
        right_BTV = 20.0 * F.one_hot(F.pad(input_ids[:, 1:], (0, 1)), VOCABULARY)
        return right_BTV * easy.view(-1, 1, 1)

    gated = CGGRModel(model, router, min_tokens_ratio=0.5, scoring="loss", **FIXED)
    loss = gated(tokens_BT, labels=tokens_BT, attention_mask=torch.ones_like(tokens_BT))
    loss.backward()
    actual = gradients(model)
    model.zero_grad()
    expected = model(tokens_BT[~easy], labels=tokens_BT[~easy]).loss
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-5)
    metrics = gated.get_metrics()
    assert (metrics["token_ratio"], metrics["tokens_selected"], metrics["tokens_total"]) == (0.5, 22, 44)


@pytest.mark.parametrize("granularity", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["plain", "right padded", "packed", "ignored"])
def test_at_ratio_one_it_is_the_model(granularity: str, kind: str) -> None:
    model, batch = model_of(), batch_of(kind)
    expected = model(**batch).loss
    gated = CGGRModel(model, min_tokens_ratio=1.0, granularity=granularity, **FIXED)
    torch.testing.assert_close(gated(**batch), expected)


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_without_any_label_loss_and_gradients_are_zero(granularity: str) -> None:
    gated = CGGRModel(model_of(), granularity=granularity, **FIXED)
    loss = gated(tokens_of(), labels=torch.full((SEQUENCES, LENGTH), -100))
    loss.backward()
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients(gated.model).values())


def test_a_sequence_without_labels_is_never_chosen() -> None:
    model, labels_BT = model_of(), tokens_of()
    labels_BT[:2] = -100
    gated = CGGRModel(model, min_tokens_ratio=0.1, selection="sampled", **FIXED)
    torch.testing.assert_close(gated(tokens_of(), labels=labels_BT), model(tokens_of(), labels=labels_BT).loss)


def test_sampled_sequences_are_unbiased() -> None:
    model, tokens_BT = model_of(), tokens_of()
    expected = model(tokens_BT, labels=tokens_BT).loss.item()
    gated = CGGRModel(model, min_tokens_ratio=0.34, selection="sampled", **FIXED)
    losses = []
    with torch.no_grad():
        for _ in range(150):
            losses.append(gated(tokens_BT, labels=tokens_BT).item())
            gated.step()
    assert sum(losses) / len(losses) == pytest.approx(expected, rel=0.1)


def test_dropout_forbids_to_choose_tokens_and_not_sequences() -> None:
    model = model_of("gpt2", resid_pdrop=0.1)
    with pytest.raises(ConfigError, match="dropout"):
        CGGRModel(model, granularity="token", **FIXED)
    gated = CGGRModel(model, **FIXED)
    for sequences in (4, 1):
        tokens_BT = tokens_of(sequences=sequences)
        gated(tokens_BT, labels=tokens_BT).backward()
    assert gradients(model)


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_the_items_of_the_whole_batch_are_the_divisor(granularity: str) -> None:
    model, batch = model_of(), batch_of("counted")
    expected = model(**batch).loss
    gated = CGGRModel(model, min_tokens_ratio=1.0, granularity=granularity, **FIXED)
    torch.testing.assert_close(gated(**batch), expected)
    assert gated(**batch | {"labels": torch.full_like(batch["labels"], -100), "num_items_in_batch": 0}) == 0


def test_what_a_call_cannot_mean_is_named() -> None:
    gated, tokens_BT = CGGRModel(model_of(), **FIXED), tokens_of()
    with pytest.raises(ConfigError, match="attention_musk: LlamaForCausalLM takes no such argument"):
        gated(tokens_BT, labels=tokens_BT, attention_musk=torch.ones_like(tokens_BT))
    with pytest.raises(ValueError, match=r"labels \(3, 11\) must have the shape of input_ids \(3, 12\)"):
        gated(tokens_BT, labels=tokens_BT[:, 1:])


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_a_batch_with_a_logit_that_is_no_number_adds_nothing(granularity: str) -> None:
    model, tokens_BT = model_of(), tokens_of()
    model.lm_head.weight.data[0] = torch.inf
    CGGRModel(model, granularity=granularity, **FIXED)(tokens_BT, labels=tokens_BT).backward()
    assert not any(gradient.any() for gradient in gradients(model).values())


def test_a_batch_of_one_is_thinned_by_tokens() -> None:
    gated = CGGRModel(model_of(), min_tokens_ratio=0.25, **FIXED)
    gated(tokens_of(sequences=1), labels=tokens_of(sequences=1)).backward()
    assert gated.get_metrics()["tokens_selected"] == 3


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_a_step_at_a_quarter_costs_far_less(granularity: str) -> None:
    model = model_of(num_hidden_layers=4, hidden_size=32, intermediate_size=96)
    tokens_BT = tokens_of(sequences=8)
    gated = CGGRModel(model, min_tokens_ratio=0.25, granularity=granularity, **FIXED)

    def step(loss: Any) -> None:
        loss().backward()
        model.zero_grad()

    whole = flops(lambda: step(lambda: model(tokens_BT, labels=tokens_BT).loss))
    spent = flops(lambda: step(lambda: gated(tokens_BT, labels=tokens_BT)))
    assert spent < (0.65 if granularity == "token" else 0.45) * whole


def test_it_learns() -> None:
    gated = CGGRModel(model_of(initializer_range=0.1), min_tokens_ratio=0.5, warmup_steps=5)
    optimizer = torch.optim.AdamW(gated.parameters(), lr=0.01)
    losses = []
    for _ in range(25):
        loss = gated(tokens_of(), labels=tokens_of())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        gated.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_without_labels_and_outside_training_it_is_the_model() -> None:
    model, tokens_BT = model_of(), tokens_of()
    gated = CGGRModel(model, **FIXED)
    assert torch.equal(gated(tokens_BT).logits, model(tokens_BT).logits)
    gated.eval()
    assert torch.equal(gated(tokens_BT, labels=tokens_BT), model(tokens_BT, labels=tokens_BT).loss)


@pytest.mark.parametrize(
    ("options", "choices"),
    [({"granularity": "word"}, "token, sequence"), ({"selection": "best"}, "topk"), ({"scoring": "best"}, "margin")],
)
def test_unknown_names_list_the_choices(options: dict[str, Any], choices: str) -> None:
    with pytest.raises(ValueError, match=f"'(word|best)' is unknown; choose one of .*{choices}"):
        CGGRModel(model_of(), **options)


def test_a_model_that_is_not_supported_is_named() -> None:
    with pytest.raises(ConfigError, match="Linear"):
        CGGRModel(torch.nn.Linear(2, 2))
