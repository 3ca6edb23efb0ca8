"""One line switches gating on under transformers.Trainer and TRL's SFTTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LENGTH, VOCABULARY, model_of, tokens_of
from torch import Tensor

import pylon_trainer.huggingface as pylon

pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

ALL = {"ratio_control": "Fixed", "token_ratio": 0.9999}
HALF = {"ratio_control": "Fixed", "token_ratio": 0.5}


class Counting(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sequences that count upwards from anywhere: easy to learn."""

    def __len__(self) -> int:
        return 160

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens_T = (torch.arange(LENGTH) + 7 * index) % VOCABULARY
        labels_T = tokens_T.clone()
        labels_T[: index % 4] = -100  # so that micro-batches differ in their number of labels
        return {"input_ids": tokens_T, "labels": labels_T}


def trainer_of(model: Any, path: Path, **arguments: Any) -> Trainer:
    settings = {
        "max_steps": 20,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.02,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return Trainer(model, TrainingArguments(str(path), **settings | arguments), train_dataset=Counting())


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_the_loss_falls_and_the_log_shows_the_ratio(tmp_path: Path) -> None:
    trainer = trainer_of(model_of(initializer_range=0.1), tmp_path)
    pylon.enable(trainer, **HALF)
    trainer.train()
    losses = logged(trainer, "loss")
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert set(logged(trainer, "gate_ratio")) == {0.5}


def test_four_accumulated_micro_batches_are_one_batch(tmp_path: Path) -> None:
    ends = []
    for sequences, accumulated in ((8, 1), (2, 4)):
        trainer = trainer_of(
            model_of(),
            tmp_path,
            max_steps=3,
            optim="sgd",
            per_device_train_batch_size=sequences,
            gradient_accumulation_steps=accumulated,
        )
        pylon.enable(trainer, **ALL)
        trainer.train()
        ends.append((trainer.model.state_dict(), logged(trainer, "loss")))
    (weights, losses), (weights_accumulated, losses_accumulated) = ends
    assert losses_accumulated == pytest.approx(losses, rel=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(weights_accumulated[name], weight, rtol=1e-3, atol=1e-5)


def test_a_gated_run_that_keeps_all_rows_is_the_plain_run(tmp_path: Path) -> None:
    plain, gated = (trainer_of(model_of(), tmp_path, max_steps=4, optim="sgd") for _ in range(2))
    pylon.enable(gated, **ALL)
    plain.train()
    gated.train()
    assert logged(gated, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-4)
    assert logged(gated, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-3)


def test_activation_checkpointing_recomputes_and_changes_nothing(tmp_path: Path) -> None:
    runs = []
    for is_checkpointing in (False, True):
        trainer = trainer_of(model_of(), tmp_path, max_steps=3, optim="sgd", gradient_checkpointing=is_checkpointing)
        pylon.enable(trainer, **HALF)
        trainer.train()
        runs.append(logged(trainer, "loss"))
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)


def test_a_resumed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = trainer_of(model_of(), tmp_path / "whole", max_steps=6, save_strategy="steps", save_steps=3)
    pylon.enable(whole, warmup_steps=6, **HALF)
    whole.train()
    resumed = trainer_of(model_of(), tmp_path / "resumed", max_steps=6)
    pylon.enable(resumed, warmup_steps=6, **HALF)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert logged(resumed, "gate_ratio") == logged(whole, "gate_ratio")
    assert logged(resumed, "loss")[-3:] == pytest.approx(logged(whole, "loss")[-3:], rel=1e-4)


def test_evaluation_is_the_models_own(tmp_path: Path) -> None:
    trainer = trainer_of(model_of(), tmp_path)
    trainer.eval_dataset = Counting()
    expected = trainer.evaluate()["eval_loss"]
    pylon.enable(trainer, **HALF)
    assert trainer.evaluate()["eval_loss"] == expected


def test_adapters_alone_get_gradients(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model_of(), config)
    batch = {"input_ids": tokens_of(), "labels": tokens_of(), "use_cache": False}
    model(**batch).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    keys = model.state_dict().keys()
    model.zero_grad()

    pylon.enable(model, **ALL)
    assert model(**batch).logits is None
    model(**batch).loss.backward()

    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert actual.keys() == expected.keys()
    assert all("lora" in name for name in actual)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=2e-5)
    assert model.state_dict().keys() == keys

    trainer = trainer_of(model, tmp_path, gradient_checkpointing=True, max_steps=2)
    trainer.train()
    assert len(logged(trainer, "loss")) == 2


@pytest.mark.parametrize("packing", [False, True])
def test_trl_trains_gated(tmp_path: Path, packing: bool) -> None:
    trl = pytest.importorskip("trl", reason="SFTTrainer needs trl")
    datasets = pytest.importorskip("datasets", reason="SFTTrainer needs datasets")
    rows = [{"input_ids": Counting()[i]["input_ids"][: 4 + i % 8].tolist()} for i in range(160)]
    runs = []
    for is_gated in (False, True):
        arguments = trl.SFTConfig(
            str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=0.01,
            optim="sgd",
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            packing=packing,
            max_length=24,
            dataset_kwargs={"skip_prepare_dataset": True} if not packing else None,
        )
        trainer = trl.SFTTrainer(
            model_of(), arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer()
        )
        if is_gated:
            pylon.enable(trainer, **ALL)
        trainer.train()
        runs.append([logged(trainer, name) for name in ("loss", "grad_norm", "mean_token_accuracy", "entropy")])
        assert logged(trainer, "gate_ratio") == [0.9999] * 3 * is_gated
    for plain, gated in zip(*runs, strict=True):
        assert gated == pytest.approx(plain, rel=1e-3)


def tokenizer() -> PreTrainedTokenizerFast:
    """One that knows numbers."""
    known = Tokenizer(WordLevel({str(token): token for token in range(VOCABULARY)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=known, pad_token="0", eos_token="1")
