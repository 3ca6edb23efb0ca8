"""What enable() refuses, and what is left after disable()."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, batch_of, gradients, model_of, tokens_of
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaForCausalLM

import pylon_trainer.huggingface as pylon
from pylon_trainer.errors import ConfigError

HALF = {"ratio_control": "Fixed", "token_ratio": 0.5}


def stranger() -> Any:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )


class Regularised(LlamaForCausalLM):
    def forward(self, *positional: Any, **named: Any) -> Any:
        output = super().forward(*positional, **named)
        output.loss = output.loss + 1
        return output


def regularised() -> Any:
    return Regularised(model_of().config)


@pytest.mark.parametrize(
    ("model", "options", "named"),
    [
        (stranger, {}, ["GPTNeoXForCausalLM", "LlamaForCausalLM", "GPT2LMHeadModel"]),
        (lambda: model_of("gpt2", resid_pdrop=0.1), {}, ["resid_dropout", "0.1", "set it to 0"]),
        (lambda: model_of(attention_dropout=0.2), {}, ["attention_dropout", "0.2", "set it to 0"]),
        (
            lambda: model_of("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1),
            {},
            ["layer_types", "use_sliding_window=False"],
        ),
        (regularised, {}, ["Regularised.forward", "LlamaForCausalLM"]),
        (lambda: model_of(output_hidden_states=True), {}, ["config.output_hidden_states", "False"]),
        (model_of, {"token_ratio": 1.5}, ["token_ratio", "1.5"]),
        (model_of, {"strategy": "Hardest"}, ["strategy", "Hardest", "GradientNorm"]),
        (model_of, {"token_ration": 0.5}, ["token_ration", "unknown field"]),
        (model_of, {"strategy": "Disabled"}, ["strategy", "Disabled", "disable()"]),
        (model_of, {"granularity": "Sequence", "engine": "HeadOnly"}, ["granularity", "CGGRModel"]),
    ],
)
def test_what_cannot_be_gated_is_refused_by_name(model: Any, options: dict[str, Any], named: list[str]) -> None:
    built = model()
    with pytest.raises(ConfigError) as refusal:
        pylon.enable(built, **options)
    assert all(word in str(refusal.value) for word in named), refusal.value
    assert "\n" not in str(refusal.value)
    assert "forward" not in vars(built)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("output_hidden_states", True),
        ("output_attentions", True),
        ("past_key_values", object()),
        ("logits_to_keep", 1),
        ("inputs_embeds", torch.zeros(1)),
        ("attention_mask", torch.ones(3, 1, 12, 12)),
        ("attention_mask", torch.tensor([[1] * 5 + [0] + [1] * 6] * 3)),
    ],
)
def test_an_argument_that_cannot_be_honoured_is_refused_by_name(argument: str, value: Any) -> None:
    model, batch = model_of(), batch_of()
    pylon.enable(model, **HALF)
    if argument == "inputs_embeds":
        del batch["input_ids"]
    with pytest.raises(ConfigError, match=argument):
        model(**batch | {argument: value})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_disabled_model_is_what_it_was(family: str) -> None:
    model, batch = model_of(family), batch_of()
    attributes, keys = set(vars(model)), list(model.state_dict())
    expected = model(**batch)
    expected.loss.backward()
    expected_gradients = gradients(model)
    model.zero_grad()

    pylon.enable(model, **HALF)
    assert list(model.state_dict()) == keys
    model(**batch).loss.backward()
    model.zero_grad()
    pylon.disable(model)

    actual = model(**batch)
    actual.loss.backward()
    assert torch.equal(actual.logits, expected.logits)
    assert torch.equal(actual.loss, expected.loss)
    assert all(torch.equal(gradient, expected_gradients[name]) for name, gradient in gradients(model).items())
    assert set(vars(model)) == attributes
    assert all("forward" not in vars(module) for module in model.modules())


def test_somebody_elses_patch_is_refused_and_stays() -> None:
    model = model_of()
    usual = model.forward
    model.forward = patched = lambda **named: usual(**named)
    with pytest.raises(ConfigError, match="before accelerate prepares the model"):
        pylon.enable(model, **HALF)
    assert model.forward is patched


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"neftune_noise_alpha": 5.0}, ["neftune_noise_alpha: 5.0", "leave it out"]),
        ({"n_gpu": 2}, ["n_gpu: 2", "DataParallel", "torchrun"]),
    ],
)
def test_what_a_trainer_does_beside_the_model_is_refused_by_name(changes: dict[str, Any], named: list[str]) -> None:
    usual = {"neftune_noise_alpha": None, "n_gpu": 1, "liger_kernel_config": None, "use_liger_kernel": False}
    trainer = SimpleNamespace(
        model=model_of(),
        args=SimpleNamespace(**usual | changes),
        add_callback=None,
        compute_loss_func=None,
        label_smoother=None,
    )
    with pytest.raises(ConfigError) as refusal:
        pylon.enable(trainer, **HALF)
    assert all(word in str(refusal.value) for word in named), refusal.value
    assert "forward" not in vars(trainer.model)


def test_trls_forward_is_stood_in_for_and_put_back() -> None:
    def theirs(**named: Any) -> Any:
        raise AssertionError(named)

    theirs.__module__ = "trl.trainer.utils"
    model, batch = model_of(), batch_of()
    model.forward = theirs
    pylon.enable(model, **HALF)
    model(**batch).loss.backward()
    pylon.disable(model)
    assert model.forward is theirs


def test_disabling_minds_not_that_the_forward_is_gone() -> None:
    model = model_of()
    pylon.enable(model, **HALF)
    del model.forward
    pylon.disable(model)
    assert model(**batch_of()).logits is not None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_gated_by_itself(copied: Any) -> None:
    model, batch = model_of(), batch_of()
    gated = pylon.enable(model, **HALF)
    model(**batch).loss.backward()
    model.zero_grad()
    twin = copied(model)
    for parameter in twin.parameters():
        parameter.data.zero_()
    output = twin(**batch)
    output.loss.backward()
    torch.testing.assert_close(output.loss.item(), 3.7612, rtol=1e-3, atol=0)  # log 43, as all tokens are alike to it
    assert output.logits is None
    assert gradients(twin)
    assert not gradients(model)
    torch.optim.SGD(twin.parameters(), lr=0.0).step()
    assert gated.step == 0
    assert copied(gated).step == 0  # with its model
    pylon.disable(twin)
    assert twin(**batch).logits is not None
    assert model(**batch).logits is None


def test_a_gated_model_that_nobody_holds_is_freed() -> None:
    model = model_of()
    pylon.enable(model, **HALF)
    known = weakref.ref(model)
    del model
    gc.collect()
    assert known() is None


def test_evaluation_generation_and_calls_without_labels_are_the_models_own() -> None:
    model = model_of()
    tokens_BT = tokens_of()
    model.eval()
    expected = model(tokens_BT, labels=tokens_BT)
    generated = model.generate(tokens_BT, max_new_tokens=4, do_sample=False)
    pylon.enable(model, **HALF)
    assert torch.equal(model(tokens_BT, labels=tokens_BT).logits, expected.logits)
    assert torch.equal(model.generate(tokens_BT, max_new_tokens=4, do_sample=False), generated)
    model.train()
    assert torch.equal(model(tokens_BT).logits, expected.logits)
    with torch.no_grad():
        assert torch.equal(model(tokens_BT, labels=tokens_BT).logits, expected.logits)


def test_positional_arguments_are_understood() -> None:
    model, batch = model_of(), batch_of()
    pylon.enable(model, **HALF)
    (loss,) = model(batch["input_ids"], labels=batch["labels"], return_dict=False)
    torch.testing.assert_close(loss, model(**batch).loss)


def test_enabling_twice_is_refused() -> None:
    model = model_of()
    pylon.enable(model)
    with pytest.raises(ConfigError, match="enabled already"):
        pylon.enable(model)


def test_the_gate_counts_the_steps_of_its_own_optimizer() -> None:
    model, other = model_of(), torch.nn.Linear(2, 2)
    gated = pylon.enable(model, **HALF)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(**batch_of()).loss.backward()
        optimizer.step()
        torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert gated.step == 3
    assert gated.report().ratio == 0.5


def test_training_past_the_gate_is_told() -> None:
    model, batch = model_of(), batch_of()
    usual = model.forward
    pylon.enable(model, **HALF)
    model(batch["input_ids"])  # without labels nothing is asked of the gate
    model.forward = usual  # as TRL's trainers do when they are built
    model(**batch).loss.backward()
    with pytest.warns(UserWarning, match="another forward"):
        torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_with_strategy_alone_the_gate_begins_with_plain_steps_and_measures() -> None:
    model, batch = model_of(), batch_of()
    gated = pylon.enable(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(40):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert gated.report().retained_mass is not None or gated.report().ratio == 1
    assert gated.report().reason


def test_a_compiled_model_keeps_its_graphs_in_plain_steps_and_leaves_them_in_gated_ones() -> None:
    graphs: list[int] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(len(module.graph.nodes))
        return module.forward

    model, batch = model_of(), batch_of()
    expected = model(**batch).loss
    gated = pylon.enable(model, warmup_steps=8, **HALF)
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    losses = []
    for _ in range(9):
        loss = compiled(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss)
    assert gated.report().ratio == 0.5
    torch.testing.assert_close(losses, [expected] * 9)
    assert max(graphs) > 100  # the whole decoder, by the plain step


def test_layers_compiled_one_by_one_are_walked_as_they_are() -> None:
    model, batch = model_of(), batch_of()
    expected = model(**batch).loss
    for layer in model.model.layers:
        layer.compile(backend="eager")
    pylon.enable(model, **HALF)
    torch.testing.assert_close(model(**batch).loss, expected)
