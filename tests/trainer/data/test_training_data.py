"""Batches: the same samples for any number of ranks, resumed exactly, nothing lost, nothing leaked."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pylon_api.training import DataSpec
from pylon_trainer.data import TrainingData, documents, merge_states, open_data
from pylon_trainer.errors import ConfigError, DataError
from pylon_trainer.step import Batch

END = 256
Open = Callable[..., TrainingData]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """40 text files of different lengths, each of one letter-number word repeated."""
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_text(f"<{number}>" * (3 + number * 7 % 29))
    return tmp_path


@pytest.fixture
def open_(corpus: Path) -> Iterator[Open]:
    opened = []

    def open_(*, rank: int = 0, world_size: int = 1, sequences: int = 8, seed: int = 0, **fields: object):
        spec = {"train": [f"{corpus}/*.txt"], "sequence_length": 32, "held_out_fraction": 0} | fields
        data = open_data(
            DataSpec.model_validate(spec),
            seed=seed,
            rank=rank,
            world_size=world_size,
            global_sequences=sequences,
        )
        opened.append(data)
        return data

    yield open_
    for data in opened:
        data.close()


def take(data: TrainingData, batches: int) -> Tensor:
    """Tokens of the next batches, batches x B x T."""
    return torch.stack([data.next_batch().tokens_BT for _ in range(batches)])


def text_of(data: TrainingData, ids: Tensor) -> str:
    return data.tokenizer.decode(ids.tolist())


def test_labels_are_the_next_tokens(open_: Open) -> None:
    batch = open_().next_batch()
    assert batch.tokens_BT.dtype == batch.labels_BT.dtype == torch.int64
    assert torch.equal(batch.tokens_BT[:, 1:], batch.labels_BT[:, :-1])
    assert batch.documents_BT is None


def test_an_epoch_holds_every_document_once(open_: Open, corpus: Path) -> None:
    data = open_(sequences=1)
    total = sum(path.stat().st_size + 1 for path in corpus.iterdir())
    stream = take(data, total // 32 + 1).flatten()[:total]
    assert int((stream == END).sum()) == 40
    epoch = "".join(sorted(path.read_text() for path in corpus.iterdir()))
    assert Counter(text_of(data, stream)) == Counter(epoch)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_samples_do_not_depend_on_the_number_of_ranks(open_: Open, world_size: int) -> None:
    alone = take(open_(), 6)
    together = [take(open_(rank=rank, world_size=world_size), 6) for rank in range(world_size)]
    assert torch.equal(torch.cat(together, dim=1), alone)


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 4), (4, 1)])
def test_resumes_at_the_exact_sample_with_any_number_of_ranks(
    open_: Open, before: int, after: int, prefetch: int
) -> None:
    expected = take(open_(), 12)[7:]
    first = [open_(rank=rank, world_size=before, prefetch_batches=prefetch) for rank in range(before)]
    for data in first:
        take(data, 7)
    state = json.loads(json.dumps(merge_states([data.state_dict() for data in first])))

    second = [open_(rank=rank, world_size=after, prefetch_batches=prefetch) for rank in range(after)]
    for data in second:
        take(data, 2)  # what was read before the restore is forgotten
        data.load_state_dict(state)
    assert torch.equal(torch.cat([take(data, 5) for data in second], dim=1), expected)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_resumes_inside_files_of_many_documents(open_: Open, tmp_path: Path, kind: str) -> None:
    import gzip

    import pyarrow
    import pyarrow.parquet

    texts = [f"[{number}]" * (number % 5 + 1) for number in range(700)]
    path = tmp_path / f"many.{kind}"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=300)
    else:
        path.write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)

    def fresh() -> TrainingData:
        return open_(train=[str(path)], sequences=2)

    expected = take(fresh(), 60)
    stopped, resumed = fresh(), fresh()
    take(stopped, 41)
    resumed.load_state_dict(stopped.state_dict())
    assert torch.equal(take(resumed, 19), expected[41:])


def test_order_is_that_of_the_seed_and_new_in_each_epoch(open_: Open) -> None:
    first, again, other = (take(open_(sequences=1, seed=seed), 90) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    ends = text_of_documents(open_(sequences=1), 250)
    assert sorted(ends[:40]) == sorted(ends[40:80])
    assert ends[:40] != ends[40:80]
    unshuffled = text_of_documents(open_(sequences=1, shuffle=False), 250)
    assert unshuffled[:40] == unshuffled[40:80] == sorted(unshuffled[:40], key=lambda t: int(t[1:].split(">")[0]))


def text_of_documents(data: TrainingData, batches: int) -> list[str]:
    ids = take(data, batches).flatten().tolist()
    borders = [place for place, token in enumerate(ids) if token == END]
    return [data.tokenizer.decode(ids[a:b]) for a, b in pairwise(borders)]


def test_isolated_documents_predict_nothing_across_their_borders(open_: Open) -> None:
    data = open_(packing="Isolated")
    borders = 0
    for _ in range(5):
        batch = data.next_batch()
        assert batch.documents_BT is not None
        assert batch.documents_BT.dtype == torch.int32
        assert (batch.documents_BT[:, 0] == 0).all()
        steps = batch.documents_BT.diff(dim=1)
        is_border = steps == 1
        assert ((steps == 0) | is_border).all()
        # A document begins with the end-of-text token; its last token is followed by one, not by the next text.
        assert (batch.tokens_BT[:, 1:][is_border] == END).all()
        assert (batch.labels_BT[:, :-1][is_border] == END).all()
        borders += int(is_border.sum())
    assert borders > 0


@pytest.mark.parametrize("files", [1, 3])
def test_fewer_documents_than_lanes_still_give_different_samples(open_: Open, tmp_path: Path, files: int) -> None:
    for number in range(files):
        (tmp_path / f"few-{number}.md").write_text("".join(f"{number} {place} " for place in range(900)))
    batch = open_(train=[f"{tmp_path}/*.md"], sequences=16).next_batch()
    assert len({tuple(row) for row in batch.tokens_BT.tolist()}) == 16


def test_held_out_documents_are_never_trained_on(open_: Open, corpus: Path) -> None:
    data = open_(held_out_fraction=0.2, packing="Isolated")
    held = [batch for batch in data.held_out(64) if isinstance(batch, Batch)]
    held_words = words(torch.cat([batch.tokens_BT for batch in held]), data)
    train_words = words(take(data, 120).flatten(0, 1), data)
    assert held_words
    assert not held_words & train_words
    assert len(held_words | train_words) == 40


def words(tokens_BT: Tensor, data: TrainingData) -> set[str]:
    """The numbers in <...> that appear whole."""
    return {piece.split("<")[1] for row in tokens_BT for piece in text_of(data, row).split(">")[:-1] if "<" in piece}


def test_held_out_set_is_fixed_and_divided_among_ranks(open_: Open) -> None:
    fields: dict[str, object] = {"held_out_fraction": 0.3}
    alone = open_(**fields)
    whole = torch.cat([batch.tokens_BT for batch in alone.held_out(11)])
    take(alone, 3)
    assert len(whole) == 11
    assert torch.equal(torch.cat([batch.tokens_BT for batch in alone.held_out(11)]), whole)
    shares = [open_(rank=rank, world_size=4, **fields).held_out(11) for rank in range(4)]
    assert torch.equal(torch.cat([batch.tokens_BT for share in shares for batch in share]), whole)
    assert all(len(batch.tokens_BT) <= 2 for share in shares for batch in share)


def test_held_out_globs_take_the_place_of_the_fraction(open_: Open, tmp_path: Path) -> None:
    (tmp_path / "held.md").write_text("only this " * 20)
    data = open_(held_out=[f"{tmp_path}/held.md"], held_out_fraction=0.5)
    assert "only this" in text_of(data, data.held_out(2)[0].tokens_BT[0])
    assert len(words(take(data, 120).flatten(0, 1), data)) == 40


def test_nothing_held_out_gives_no_batches(open_: Open) -> None:
    assert open_(held_out_fraction=0).held_out(8) == []


def test_documents_of_jsonl_are_held_out_one_by_one(open_: Open, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"<{number}>" * 9}) + "\n" for number in range(200)))
    data = open_(train=[str(path)], held_out_fraction=0.1, sequences=4)
    held = words(torch.cat([batch.tokens_BT for batch in data.held_out(40)]), data)
    assert 8 <= len(held) <= 35
    assert not held & words(take(data, 150).flatten(0, 1), data)


def test_a_fraction_that_comes_to_no_document_is_said_and_training_goes_on(
    open_: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "few.jsonl").write_text('{"text": "a few words"}\n' * 5)
    data = open_(train=[f"{tmp_path}/few.jsonl"], held_out_fraction=1e-9)
    assert data.held_out(4) == []
    assert caplog.messages == ["training.data.heldOutFraction 1e-09 comes to no document: no held-out loss"]
    assert "a few words" in text_of(data, data.next_batch().tokens_BT[0])


def test_held_out_globs_without_text_are_refused(open_: Open, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="none holds any text"):
        open_(held_out=[f"{tmp_path}/none.jsonl"]).held_out(4)


def test_errors_while_reading_ahead_surface_at_the_next_batch(open_: Open, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' * 30 + "broken\n")
    data = open_(train=[f"{tmp_path}/a.jsonl"], sequences=1, shuffle=False, held_out_fraction=0)
    with pytest.raises(DataError, match="line 31"):
        take(data, 50)


def test_a_corpus_without_text_is_refused(open_: Open, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n\n')
    with pytest.raises(DataError, match="none holds any text"):
        open_(train=[f"{tmp_path}/a.jsonl"], sequences=1).next_batch()


def test_a_fraction_that_leaves_nothing_is_refused(open_: Open) -> None:
    with pytest.raises(DataError, match="heldOutFraction"):
        open_(held_out_fraction=1)


def test_a_state_of_another_batch_is_refused(open_: Open) -> None:
    with pytest.raises(ConfigError, match=r"batch\.sequences: 8, but .* 4 sequences"):
        open_(sequences=8).load_state_dict(open_(sequences=4).state_dict())


def test_closing_leaves_no_thread(corpus: Path) -> None:
    before = threading.active_count()
    spec = DataSpec(train=[f"{corpus}/*.txt"], sequence_length=32)
    with closing(open_data(spec, seed=0, rank=0, world_size=1, global_sequences=4)) as data:
        data.next_batch()
        assert threading.active_count() > before
    assert threading.active_count() == before


def test_large_text_files_feed_many_lanes(open_: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "SMALLEST_PIECE_BYTES", 64)
    (tmp_path / "large.md").write_text("".join(f"line {number}\n" for number in range(2000)))
    data = open_(train=[f"{tmp_path}/large.md"], sequences=32)
    batch = data.next_batch()
    assert len({tuple(row) for row in batch.tokens_BT.tolist()}) == 32
