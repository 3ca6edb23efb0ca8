"""Exports load in transformers with equal logits and ids, and are there whole or not at all; samples are repeatable."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
import torch
import transformers

from pylon_api.training import ModelSpec
from pylon_trainer.checkpoint.storage import Storage
from pylon_trainer.data.tokenizer import ByteTokenizer
from pylon_trainer.errors import ConfigError, StorageError
from pylon_trainer.export import export_hugging_face
from pylon_trainer.models import Decoder, build_model
from pylon_trainer.models.resonate.dlra import AdaptedLinear
from pylon_trainer.sampling import generate

TEXT = "def grüße():\n    return 🎉"


def model_of(**fields: object) -> Decoder:
    torch.manual_seed(0)
    spec = {"layers": 2, "hidden_size": 32, "heads": 4, "intermediate_size": 48, "initializer_std": 0.2}
    return build_model(ModelSpec.model_validate(spec | fields), vocab_size=257)


def resonate_of(fields: dict[str, object] | None = None, **own: object) -> Decoder:
    """Four blocks; `fields` are of any architecture."""
    plain = {"head_width": 16, "state_size": 8, "attention_every": 2}
    return model_of(**{"layers": 4, "architecture": "Resonate", "resonate": plain | own} | (fields or {}))


def exported(model: Decoder, path: Path) -> transformers.PreTrainedModel:
    """What transformers loads, with neither a weight too many nor one too few."""
    export_hugging_face(model, ByteTokenizer(), str(path), sequence_length=64)
    loaded, notes = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not notes["missing_keys"]
    assert not notes["unexpected_keys"]
    return loaded


@pytest.mark.parametrize(
    "fields",
    [
        {"tie_embeddings": True, "kv_heads": 2},
        {"tie_embeddings": False, "rope_theta": 700.0, "norm_epsilon": 1e-3},
        {"embedding_rank": 8},
        {"embedding_rank": 8, "tie_embeddings": False},
    ],
)
def test_transformers_loads_it_with_equal_logits(tmp_path: Path, fields: dict[str, object]) -> None:
    model = model_of(**fields)
    llama = exported(model, tmp_path)
    assert isinstance(llama, transformers.LlamaForCausalLM)
    ids_BT = torch.randint(0, 257, (2, 19))
    torch.testing.assert_close(llama(ids_BT).logits, model.head(model(ids_BT)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "own"),
    [
        ({}, {}),
        ({"layers": 3}, {"attention_every": 0}),
        ({}, {"attention_every": 1}),
        ({"kv_heads": 2, "rope_theta": 700.0}, {"conv_width": 2}),
        ({"tie_embeddings": False, "norm_epsilon": 1e-3}, {"conv_width": 1}),
        ({"embedding_rank": 8}, {"expand": 4, "head_width": 32, "state_size": 5}),
        ({"embedding_rank": 8, "tie_embeddings": False}, {"expand": 1, "conv_width": 6}),
    ],
)
def test_transformers_loads_resonate_with_equal_logits_and_continuations(
    tmp_path: Path, fields: dict[str, object], own: dict[str, object]
) -> None:
    model = resonate_of(fields, **own)
    hybrid = exported(model, tmp_path)
    assert isinstance(hybrid, transformers.GraniteMoeHybridForCausalLM)
    ids_BT = torch.randint(0, 257, (2, 19))
    torch.testing.assert_close(hybrid(ids_BT).logits, model.head(model(ids_BT)), rtol=1e-5, atol=1e-5)

    ours_BT = ids_BT
    for _ in range(12):
        ours_BT = torch.cat([ours_BT, model.head(model(ours_BT)[:, -1:]).argmax(-1)], dim=1)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(hybrid.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **options), ours_BT)
    assert hybrid.config.use_cache == model.attends


def test_transformers_loads_the_tokenizer(tmp_path: Path) -> None:
    export_hugging_face(model_of(), ByteTokenizer(), str(tmp_path), sequence_length=64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(TEXT)["input_ids"] == list(TEXT.encode())
    assert tokenizer.decode(list(TEXT.encode())) == TEXT
    assert tokenizer.eos_token_id == 256


@pytest.mark.parametrize("failing", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_failed_export_leaves_nothing(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Storage.write

    def fill_the_disk(store: Storage, path: str, data: bytes) -> None:
        if path == failing:
            raise StorageError(f"cannot write {path}: no space left there")
        write(store, path, data)

    uri = f"memory://exports/{failing}"
    export_hugging_face(model_of(), ByteTokenizer(), uri, sequence_length=64)
    monkeypatch.setattr(Storage, "write", fill_the_disk)
    with pytest.raises(StorageError, match="no space left"):
        export_hugging_face(model_of(), ByteTokenizer(), uri, sequence_length=64)
    assert fsspec.filesystem("memory").find(f"/exports/{failing}") == []


@pytest.mark.parametrize("base", ["Zero", "Seed", "Dense"])
def test_adapted_layers_are_multiplied_out_with_the_ranks_in_use(tmp_path: Path, base: str) -> None:
    model = resonate_of(adaptation={"base": base, "rank": 2, "maximum_rank": 8})
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, AdaptedLinear):
                layer.outward.weight.normal_(std=0.2)  # ranks that are not in use yet too
    ids_BT = torch.randint(0, 257, (2, 19))
    torch.testing.assert_close(
        exported(model, tmp_path)(ids_BT).logits, model.head(model(ids_BT)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("own", "problem"),
    [
        ({"long_convolution_every": 4}, "model.resonate.longConvolutionEvery 0, not 4"),
        ({"groups": 2}, "model.resonate.groups 1, not 2"),
        ({"activation": "Gelu"}, "model.resonate.activation Silu, not Gelu"),
        ({"activation": "Binlop"}, "model.resonate.activation Silu, not Binlop"),
        ({"control": {"vector_size": 8}}, "model.resonate.control unset"),
        ({"stability": {}}, "model.resonate.stability unset"),
        ({"adaptation": {"maximum_rank": 8, "codebook": {}}}, "model.resonate.adaptation.codebook unset"),
    ],
)
def test_a_model_that_no_form_can_hold_is_refused_and_leaves_nothing(
    tmp_path: Path, own: dict[str, object], problem: str
) -> None:
    with pytest.raises(ConfigError, match=f"export.format HuggingFace needs {problem}: .* set Disabled"):
        export_hugging_face(resonate_of(**own), ByteTokenizer(), f"{tmp_path}/export", sequence_length=64)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("attention_every", [0, 2])
def test_a_recurrent_model_samples_as_if_it_read_everything_anew(attention_every: int) -> None:
    model, tokenizer = resonate_of(attention_every=attention_every), ByteTokenizer()
    text = generate(model, tokenizer, "x", 5, seed=0, sequence_length=64, temperature=0)
    ids = [256, ord("x")]
    for _ in range(5):
        ids.append(int(model.head(model(torch.tensor([ids]))[0, -1])[:257].argmax()))
    assert text == "x" + tokenizer.decode(ids[2:])


def test_samples_follow_from_the_seed() -> None:
    model, tokenizer = model_of(), ByteTokenizer()
    first, again, other = (generate(model, tokenizer, "def ", 20, seed, sequence_length=64) for seed in (1, 1, 2))
    assert first == again != other
    assert first.startswith("def ")


def test_temperature_zero_takes_the_most_probable_token() -> None:
    model, tokenizer = model_of(vocab_size=300), ByteTokenizer()
    text = generate(model, tokenizer, "x", 5, seed=0, sequence_length=64, temperature=0)
    ids = [256, ord("x")]
    for _ in range(5):
        ids.append(int(model.head(model(torch.tensor([ids]))[0, -1])[:257].argmax()))
    assert text == "x" + tokenizer.decode(ids[2:])


def test_a_sample_looks_back_no_further_than_training_did() -> None:
    model = model_of()
    lengths: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    generate(model, ByteTokenizer(), "abcdef", 6, seed=0, sequence_length=9)
    assert lengths == [7, 8, 9, 9, 9, 9]


def test_the_end_of_the_text_ends_the_sample() -> None:
    model = model_of(tie_embeddings=False)
    assert model.output is not None
    with torch.no_grad():
        model.norm.weight.zero_()  # every logit 0: the least id wins at temperature 0
        model.output.weight.zero_()
    tokenizer = ByteTokenizer()
    tokenizer.end_of_text = 0
    assert generate(model, tokenizer, "a", 10, seed=0, sequence_length=64, temperature=0) == "a"
