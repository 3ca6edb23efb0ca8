"""CGGRWrapper leaves the output alone and routes gradients by depth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flops import flops
from tiny_models import FAMILIES, LENGTH, SEQUENCES, VOCABULARY, batch_of, gradients, model_of, tokens_of

from pylon_trainer.cggr import CGGRWrapper
from pylon_trainer.errors import ConfigError


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["plain", "left padded", "packed", "counted"])
def test_the_output_is_the_models(family: str, kind: str) -> None:
    model, batch = model_of(family), batch_of(kind)
    expected = model(**batch)
    actual = CGGRWrapper(model, warmup_steps=0)(**batch)
    torch.testing.assert_close(actual.loss, expected.loss)
    labelled_BT = F.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100
    torch.testing.assert_close(actual.logits[labelled_BT], expected.logits[labelled_BT])


@pytest.mark.parametrize("options", [{"num_buckets": 1}, {"leak_rate": 1.0}, {"warmup_steps": 100}])
def test_without_routing_the_gradients_are_the_models(options: dict[str, Any]) -> None:
    model, batch = model_of(), batch_of()
    model(**batch).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    CGGRWrapper(model, **{"warmup_steps": 0} | options)(**batch).loss.backward()
    assert_same(gradients(model), expected)


def test_easy_tokens_end_higher_up() -> None:
    """The embedding of a token that stands once in the batch has a gradient only if its row goes to the bottom."""
    model = model_of(num_hidden_layers=4)
    tokens_BT = torch.randperm(VOCABULARY)[: SEQUENCES * LENGTH].view(SEQUENCES, LENGTH)
    wrapper = CGGRWrapper(model, warmup_steps=0)
    logits = wrapper(tokens_BT).logits
    logits.logsumexp(-1).sum().backward()

    p_NV = logits.detach().flatten(0, 1).softmax(-1)
    entropy_N = -(p_NV * p_NV.log()).sum(-1)
    hardest = (entropy_N - p_NV.amax(-1)).topk(SEQUENCES * LENGTH // 4).indices
    reached = model.model.embed_tokens.weight.grad.abs().sum(-1) > 0
    assert set(reached.nonzero().flatten().tolist()) == set(tokens_BT.flatten()[hardest].tolist())


def test_the_upper_blocks_get_the_whole_gradient() -> None:
    # With 3 layers and 3 tiers all rows go back over the highest block.
    model, batch = model_of(), batch_of()
    model(**batch).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    CGGRWrapper(model, num_buckets=3, warmup_steps=0)(**batch).loss.backward()
    actual = gradients(model)
    # The keys and values of the highest block feed nobody below it.
    for name in ("lm_head.weight", "model.norm.weight", "model.layers.2.mlp.down_proj.weight"):
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-3, atol=2e-5)
    assert not torch.allclose(
        actual["model.layers.0.mlp.down_proj.weight"], expected["model.layers.0.mlp.down_proj.weight"]
    )


def test_leaked_rows_keep_the_lower_gradient_unbiased() -> None:
    model, batch = model_of(), batch_of()
    model(**batch).loss.backward()
    name = "model.layers.0.mlp.down_proj.weight"
    expected = gradients(model)[name]
    # Keys and values of ended rows are cut, so only nearly.
    wrapper = CGGRWrapper(model, warmup_steps=0, leak_rate=0.5)
    total = torch.zeros_like(expected)
    for _ in range(30):
        model.zero_grad()
        wrapper(**batch).loss.backward()
        wrapper.step()
        total += gradients(model)[name]
    assert F.cosine_similarity(total.flatten(), expected.flatten(), dim=0) > 0.8


def test_the_cost_falls() -> None:
    model = model_of(num_hidden_layers=4, hidden_size=32, intermediate_size=96)
    wrapper, batch = CGGRWrapper(model, warmup_steps=0), batch_of()
    whole = flops(lambda: model(**batch).loss.backward())
    routed = flops(lambda: wrapper(**batch).loss.backward())
    assert routed < 0.85 * whole


def test_tiers_open_one_by_one_and_the_count_is_kept() -> None:
    model = model_of()
    wrapper = CGGRWrapper(model, warmup_steps=6)
    opened = []
    for _ in range(8):
        opened.append(wrapper.opened)
        wrapper.step()
    assert opened == [0, 0, 1, 1, 2, 2, 3, 3]
    keys = {f"model.{key}" for key in model.state_dict()}
    assert set(wrapper.state_dict()) == {"current_step_count", *keys}
    resumed = CGGRWrapper(model_of(), warmup_steps=6)
    resumed.load_state_dict(wrapper.state_dict())
    assert resumed.opened == 3


def test_draws_follow_from_the_step_alone() -> None:
    drawn = []
    for passes_before in (0, 2):
        model, batch = model_of(), batch_of()
        wrapper = CGGRWrapper(model, warmup_steps=0, leak_rate=0.5)
        for _ in range(passes_before):
            wrapper(**batch)
        wrapper.step()
        wrapper(**batch).loss.backward()
        drawn.append(gradients(model))
    assert_same(*drawn)


def test_labels_of_none_are_no_labels_and_averages_are_of_labelled_tokens() -> None:
    wrapper, batch = CGGRWrapper(model_of(), warmup_steps=0), batch_of("ignored")
    wrapper(**batch)
    logits = wrapper.model(batch["input_ids"]).logits[:, 3:-1].flatten(0, 1)
    assert wrapper.get_metrics()["avg_confidence"] == pytest.approx(logits.softmax(-1).amax(-1).mean().item(), rel=1e-4)
    assert wrapper(batch["input_ids"], labels=None).loss is None


def test_outside_training_it_is_the_model() -> None:
    model = model_of()
    wrapper = CGGRWrapper(model, warmup_steps=0).eval()
    assert torch.equal(wrapper(tokens_of()).logits, model(tokens_of()).logits)
    assert wrapper.get_metrics() == {"step": 0, "routing_active": False}


@pytest.mark.parametrize(
    ("options", "named"),
    [({"num_buckets": 0}, "num_buckets"), ({"leak_rate": 2}, "leak_rate"), ({"warmup_steps": -1}, "warmup")],
)
def test_numbers_that_cannot_be_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        CGGRWrapper(model_of(), **options)


def test_a_model_that_is_not_supported_is_named() -> None:
    with pytest.raises(ConfigError, match="Linear"):
        CGGRWrapper(torch.nn.Linear(2, 2))
