"""The Transformer computes what transformers' Llama computes, and isolates documents."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor

from pylon_api.training import ModelSpec
from pylon_trainer.data.tokenizer import ByteTokenizer
from pylon_trainer.errors import ConfigError
from pylon_trainer.export import ATTENTION, LLAMA_MLP, config_of, weights_of
from pylon_trainer.models import Transformer, build_model

VOCABULARY = 97


def model_of(**fields: object) -> Transformer:
    """A tiny model with weights large enough that a mistake shows."""
    torch.manual_seed(0)
    spec = {"layers": 2, "hidden_size": 48, "heads": 4, "intermediate_size": 80, "initializer_std": 0.15}
    return build_model(ModelSpec.model_validate(spec | fields), vocab_size=VOCABULARY)


def llama_of(model: Transformer) -> transformers.LlamaForCausalLM:
    """transformers' Llama with the same weights."""
    config = transformers.LlamaConfig(**config_of(model, ByteTokenizer(), 64))
    llama = transformers.LlamaForCausalLM(config)
    missing = llama.load_state_dict(weights_of(model), strict=False)
    assert missing.unexpected_keys == []
    llama.tie_weights()
    return llama


def tokens_of(sequences: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))


def backward_of(logits_BTV: Tensor) -> None:
    """A loss whose gradient differs at every logit."""
    weights = torch.randn(logits_BTV.shape, generator=torch.Generator().manual_seed(2))
    (logits_BTV.float() * weights).sum().backward()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("length", [1, 13, 32])
def test_equals_llama_with_gradients(kv_heads: int, tied: bool, length: int) -> None:
    model = model_of(kv_heads=kv_heads, tie_embeddings=tied, rope_theta=500.0)
    llama = llama_of(model)
    tokens_BT = tokens_of(3, length)

    logits, expected = model.head(model(tokens_BT)), llama(tokens_BT).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    backward_of(logits)
    backward_of(expected)
    for theirs, ours in parameter_pairs(llama, model):
        assert ours.grad is not None
        assert theirs.grad is not None
        scale = theirs.grad.abs().max()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=float(1e-5 * scale))


def test_bfloat16_is_as_close_to_float32_as_llama_is() -> None:
    model = model_of(kv_heads=2)
    llama = llama_of(model)
    tokens_BT = tokens_of(2, 17)
    exact = model.head(model(tokens_BT)).detach()
    model.bfloat16()
    llama.bfloat16()

    logits, expected = model.head(model(tokens_BT)), llama(tokens_BT).logits
    error, their_error = (logits - exact).abs().mean(), (expected - exact).abs().mean()
    assert error < 1.5 * their_error

    backward_of(logits)
    backward_of(expected)
    for theirs, ours in parameter_pairs(llama, model):
        assert ours.grad is not None
        assert theirs.grad is not None
        difference = (ours.grad - theirs.grad).float().norm() / theirs.grad.float().norm()
        assert difference < 0.05


def parameter_pairs(
    llama: transformers.LlamaForCausalLM, model: Transformer
) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    pairs = [
        (llama.model.embed_tokens.weight, model.embedding.weight),
        (llama.model.norm.weight, model.norm.weight),
    ]
    if model.output is not None:
        pairs.append((llama.lm_head.weight, model.output.weight))
    for block, layer in zip(model.blocks, llama.model.layers, strict=True):
        pairs += [
            (layer.get_parameter(theirs), block.get_parameter(ours))
            for theirs, (ours,) in (ATTENTION | LLAMA_MLP).items()
        ]
    return pairs


@pytest.mark.parametrize("tied", [True, False])
def test_factorised_embeddings_equal_their_product(tied: bool) -> None:
    model = model_of(embedding_rank=8, tie_embeddings=tied)
    tokens_BT = tokens_of(2, 9)
    hidden_BTD = model(tokens_BT)

    torch.testing.assert_close(model.head(hidden_BTD), hidden_BTD @ model.head_weight.T)
    torch.testing.assert_close(model.head(hidden_BTD), llama_of(model)(tokens_BT).logits, rtol=1e-5, atol=1e-5)


def test_no_token_sees_a_later_one() -> None:
    model = model_of()
    tokens_BT = tokens_of(1, 12)
    changed_BT = tokens_BT.clone()
    changed_BT[0, 7:] = (changed_BT[0, 7:] + 1) % VOCABULARY

    before, after = model(tokens_BT), model(changed_BT)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_isolated_documents_equal_each_document_alone() -> None:
    model = model_of(kv_heads=2)
    lengths = [5, 1, 9, 3]
    tokens_BT = tokens_of(1, sum(lengths))
    documents_BT = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()[None]

    together = model(tokens_BT, documents_BT)
    alone = torch.cat([model(part) for part in tokens_BT.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_initialisation_is_that_of_the_seed_and_shrinks_residual_projections() -> None:
    spec = ModelSpec(layers=8, hidden_size=128, heads=4, initializer_std=0.05)
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(build_model(spec, vocab_size=VOCABULARY))
    first, again, other = (model.state_dict() for model in models)

    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])
    assert first["blocks.3.attention.query.weight"].std() == pytest.approx(0.05, rel=0.05)
    assert first["blocks.3.mlp.down.weight"].std() == pytest.approx(0.05 / 4, rel=0.05)


@pytest.mark.parametrize(
    ("fields", "numbers"),
    [({"vocab_size": 96}, ("96", "97")), ({"embedding_rank": 48}, ("48", "hiddenSize"))],
)
def test_sizes_that_cannot_work_are_refused(fields: dict[str, int], numbers: tuple[str, str]) -> None:
    with pytest.raises(ConfigError) as refused:
        model_of(**fields)
    assert all(number in str(refused.value) for number in numbers)


def test_spare_rows_of_the_vocabulary_are_allowed() -> None:
    assert model_of(vocab_size=128).head(torch.zeros(2, 48)).shape == (2, 128)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [64, 200])
def test_isolated_documents_on_a_gpu_equal_the_cpu(length: int) -> None:
    model = model_of(hidden_size=64, kv_heads=2)
    tokens_BT = tokens_of(2, length)
    documents_BT = torch.stack([torch.arange(length) // 19, torch.arange(length) // 50]).int()
    outputs, gradients = [], []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        hidden_BTD = model(tokens_BT.to(device), documents_BT.to(device))
        backward_of(hidden_BTD.cpu())
        outputs.append(hidden_BTD.detach().cpu())
        gradients.append({name: p.grad.clone().cpu() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(outputs[1], outputs[0], rtol=2e-3, atol=2e-3)
    for name, expected in gradients[0].items():
        assert (gradients[1][name] - expected).norm() < 5e-3 * expected.norm(), name
