"""Tokenizers: round trips, special tokens, refusals, and the commands that train and measure them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tokenizers
from click.testing import CliRunner, Result

from pylon_api.training import TokenizerKind, TokenizerSpec
from pylon_trainer.data.bpe import train_bpe
from pylon_trainer.data.cli import tokenizer as command
from pylon_trainer.data.entropy import ngram_entropies
from pylon_trainer.data.tokenizer import ByteTokenizer, FileTokenizer, load_tokenizer
from pylon_trainer.errors import ConfigError, DataError

TEXT = 'def grüße(name):\n\treturn f"Hallo {name} 🎉 <|endoftext|>"\n\n'


def file_spec(path: Path, end_of_text: str | None = None) -> TokenizerSpec:
    return TokenizerSpec(kind=TokenizerKind.FILE, uri=str(path), end_of_text=end_of_text)


@pytest.fixture
def bpe_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    train_bpe(iter([TEXT * 20]), 300).save(str(path))
    return path


def test_bytes_round_trip() -> None:
    bytes_ = load_tokenizer(TokenizerSpec())
    assert bytes_.vocab_size == 257
    assert bytes_.encode(TEXT).tolist() == list(TEXT.encode())
    assert bytes_.decode([*bytes_.encode(TEXT).tolist(), bytes_.end_of_text]) == TEXT
    assert bytes_.decode(list("ü".encode())[:1]) == "\ufffd"


def test_the_file_form_of_bytes_gives_the_same_ids(tmp_path: Path) -> None:
    (tmp_path / "bytes.json").write_text(ByteTokenizer().to_json())
    loaded = load_tokenizer(file_spec(tmp_path / "bytes.json"))
    assert loaded.encode(TEXT).tolist() == list(TEXT.encode())
    assert loaded.decode(list(TEXT.encode())) == TEXT
    assert (loaded.vocab_size, loaded.end_of_text) == (257, 256)


def test_files_round_trip_and_special_tokens_in_text_stay_text(bpe_file: Path) -> None:
    loaded = load_tokenizer(file_spec(bpe_file))
    ids = loaded.encode(TEXT).tolist()
    assert len(ids) < len(TEXT)
    assert loaded.end_of_text not in ids
    assert loaded.decode(ids) == TEXT
    assert loaded.fingerprint == load_tokenizer(file_spec(bpe_file)).fingerprint != ByteTokenizer().fingerprint


def test_truncation_and_padding_of_the_file_are_ignored(bpe_file: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(bpe_file))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(bpe_file))
    loaded = load_tokenizer(file_spec(bpe_file))
    assert loaded.decode(loaded.encode(TEXT).tolist()) == TEXT


def test_end_of_text_is_found_or_asked_for(bpe_file: Path, tmp_path: Path) -> None:
    content = json.loads(bpe_file.read_text())
    spelled = json.dumps(content).replace("<|endoftext|>", "<my-end>")
    (tmp_path / "one.json").write_text(spelled)
    assert load_tokenizer(file_spec(tmp_path / "one.json")).end_of_text_token == "<my-end>"

    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "one.json"))
    backend.add_special_tokens(["<other>"])
    backend.save(str(tmp_path / "two.json"))
    with pytest.raises(ConfigError, match=r"endOfText: not set.*<my-end>, <other>"):
        load_tokenizer(file_spec(tmp_path / "two.json"))
    with pytest.raises(ConfigError, match=r"endOfText: <nope>, .* no such token"):
        load_tokenizer(file_spec(tmp_path / "two.json", "<nope>"))
    assert load_tokenizer(file_spec(tmp_path / "two.json", "<other>")).end_of_text_token == "<other>"


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(ConfigError, match=r"bad\.json is no tokenizer\.json"):
        load_tokenizer(file_spec(tmp_path / "bad.json"))
    with pytest.raises(DataError, match=r"training\.data\.tokenizer\.uri: .*none\.json: no such file"):
        load_tokenizer(file_spec(tmp_path / "none.json"))


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_train_and_inspect(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT * 50)
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": TEXT}) + "\n")
    out = tmp_path / "tokenizer.json"

    trained = invoke("train", "--out", out, "--vocab-size", 290, tmp_path / "a.txt")
    assert trained.exit_code == 0, trained.output
    assert f"{out}: 290 tokens" in trained.output
    assert isinstance(load_tokenizer(file_spec(out)), FileTokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.jsonl", "tokenizer.json"]

    measured = invoke("inspect", "--tokenizer", out, "--text-field", "body", tmp_path / "b.jsonl")
    assert f"bytes            {len(TEXT.encode())}" in measured.output
    assert float(measured.output.split()[-1]) > 1.5
    assert invoke("inspect", tmp_path / "a.txt").output.split()[-1] == "1.000"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--out", "{}/t.json", "{}/none.txt"], "matches no file"),
        (["--out", "{}/t.json", "--vocab-size", "256", "{}/a.txt"], "256 is too small, at least 257"),
        (["--out", "{}/none/t.json", "{}/a.txt"], "there is no directory"),
    ],
)
def test_training_refuses_in_one_line_and_writes_nothing(tmp_path: Path, arguments: list[str], says: str) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    result = invoke("train", *(argument.format(tmp_path) for argument in arguments))
    assert result.exit_code == 1
    assert says in result.output.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_failed_training_keeps_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("broken\n")
    (tmp_path / "t.json").write_text("old")
    assert invoke("train", "--out", tmp_path / "t.json", tmp_path / "a.jsonl").exit_code == 1
    assert (tmp_path / "t.json").read_text() == "old"


def test_entropies_by_hand() -> None:
    unigram, bigram, trigram = ngram_entropies(["ab" * 1000])
    assert unigram.nats_per_byte == pytest.approx(math.log(2))
    assert bigram.nats_per_byte == pytest.approx(0, abs=1e-6)
    assert trigram.nats_per_byte == pytest.approx(0, abs=1e-6)
    # After a comes b or c, evenly; after b or c always a: half the bytes cost log 2.
    coin, even = ngram_entropies(["abac" * 5000], orders=2)
    assert coin.nats_per_byte == pytest.approx(1.5 * math.log(2), rel=1e-6)
    assert even.nats_per_byte == pytest.approx(0.5 * math.log(2), rel=1e-3)
    assert [entropy.nats_per_byte for entropy in ngram_entropies(["", "x"])] == [0, 0, 0]


def test_entropy_command(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab" * 100)
    output = invoke("entropy", tmp_path / "a.txt").output
    assert "unigram  0.693 nats a byte" in output
    assert "bigram   0.000 nats a byte" in output
