"""Files and documents: what globs find, how pieces read, and one clear line for each thing that cannot be read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from pylon_api.training import DataFormat
from pylon_trainer.data import documents
from pylon_trainer.data.documents import Document, cut
from pylon_trainer.data.sources import explained, list_files
from pylon_trainer.errors import ConfigError, DataError, StorageError, TrainerError


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    content = "".join(json.dumps({field: text, "id": number}) + "\n" for number, text in enumerate(texts))
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


def write_parquet(path: Path, texts: list[str | None], field: str = "text") -> Path:
    pyarrow.parquet.write_table(pyarrow.table({field: texts}), path, row_group_size=3)
    return path


def read(glob: object, field: str = "text", kind: DataFormat = DataFormat.AUTO) -> list[Document]:
    pieces = cut(list_files([str(glob)], "training.data.train"), kind)
    return [document for piece in pieces for document in piece.documents(field)]


def texts(glob: object, **options: object) -> list[str]:
    return [document.text for document in read(glob, **options)]


def test_globs_find_files_once_in_order_without_empty_ones(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "other.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "empty.txt").touch()
    files = list_files([f"{tmp_path}/**/*.txt", f"file://{tmp_path}/a.txt"], "training.data.train")
    assert [file.path.removeprefix(f"{tmp_path}/") for file in files] == ["a.txt", "b.txt", "deep/er/c.txt"]


def test_any_fsspec_store_is_read() -> None:
    store = fsspec.filesystem("memory")
    store.pipe("/books/one.txt", b"from memory")
    assert texts("memory://books/*.txt") == ["from memory"]


def test_the_standard_library_is_there_without_tests_and_packages() -> None:
    uris = [file.uri for file in list_files(["python://stdlib/**/*.py"], "training.data.train")]
    assert "python://stdlib/json/decoder.py" in uris
    assert not [uri for uri in uris if "/test/" in uri or "/tests/" in uri or "site-packages" in uri]


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    expected = ["first", "zweites Dokument: äöü", "third\nof two lines", "4", "5"]
    write_jsonl(tmp_path / "a.jsonl", expected)
    write_jsonl(tmp_path / "b.jsonl.gz", expected)
    write_parquet(tmp_path / "c.parquet", [*expected[:2], None, *expected[2:]])
    (tmp_path / "d").mkdir()
    for number, text in enumerate(expected):
        (tmp_path / "d" / f"{number}.txt").write_text(text)
    for glob in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d/*.txt"):
        assert texts(tmp_path / glob) == expected


def test_a_large_file_is_cut_and_nothing_is_lost_or_doubled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "SMALLEST_PIECE_BYTES", 16)
    lines = [f"{'ä' * (number % 23)} line {number}\n" for number in range(200)]
    (tmp_path / "large.txt").write_text("".join(lines))
    parts = read(tmp_path / "large.txt")
    assert "".join(part.text for part in parts) == "".join(lines)
    assert len(parts) > 30
    assert [part.begins for part in parts] == [True] + [False] * (len(parts) - 1)
    assert [part.ends for part in parts] == [False] * (len(parts) - 1) + [True]

    write_jsonl(tmp_path / "large.jsonl", lines)
    assert texts(tmp_path / "large.jsonl") == lines


def test_lines_longer_than_a_piece_stay_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "SMALLEST_PIECE_BYTES", 8)
    lines = ["short", "x" * 100, "", "y" * 31, "last"]
    write_jsonl(tmp_path / "long.jsonl", lines)
    assert texts(tmp_path / "long.jsonl") == lines


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"fine\nnot \xff\xfe text", ["a.txt", "not UTF-8 at byte 9"]),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', ["a.jsonl, line 3", "not JSON"]),
        ("a.jsonl", b'{"text": "x"}\n["list"]\n', ["line 2", "no JSON object"]),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', ["line 1", "'text'", "body, id", "textField"]),
        ("a.jsonl", b'{"text": 7}\n', ["line 1", "no text in field 'text'"]),
        ("a.jsonl", b'{"text": "\xff"}\n', ["line 1", "not JSON"]),
        ("a.jsonl.gz", b"not gzip", ["a.jsonl.gz", "gzip"]),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99)[:-12], ["a.jsonl.gz", "not a whole gzip file"]),
        ("a.parquet", b"PAR1 nonsense PAR1", ["a.parquet", "not a whole Parquet file"]),
        ("a.parquet", b"x", ["a.parquet", "not a whole Parquet file"]),
    ],
)
def test_unreadable_content_is_named(tmp_path: Path, name: str, content: bytes, says: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as refused:
        read(tmp_path / name)
    assert all(part in str(refused.value) for part in says), str(refused.value)
    assert "\n" not in str(refused.value)


def test_line_numbers_count_from_the_start_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "SMALLEST_PIECE_BYTES", 64)
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' * 40 + "broken\n")
    with pytest.raises(DataError, match="line 41"):
        read(tmp_path / "a.jsonl")


def test_parquet_without_the_column_names_those_there_are(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["x"], field="content")
    with pytest.raises(DataError, match=r"no column 'text', there is content; set training\.data\.textField"):
        read(path)
    assert texts(path, field="content") == ["x"]


def test_truncated_parquet_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["some text"] * 20)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="not a whole Parquet file"):
        read(path)


@pytest.mark.parametrize(
    ("glob", "error", "says"),
    [
        ("/nowhere/*.txt", DataError, "matches no file"),
        ("/nowhere/a.txt", DataError, "matches no file"),
        ("bogus://bucket/*.txt", ConfigError, "unknown scheme bogus://"),
        ("python://numpy/*.py", ConfigError, "python://stdlib/"),
    ],
)
def test_globs_that_cannot_work(glob: str, error: type[TrainerError], says: str) -> None:
    with pytest.raises(error) as refused:
        list_files([glob], "training.data.train")
    assert says in str(refused.value)
    assert str(refused.value).startswith("training.data.train: ")


def test_only_empty_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match="all 1 files are empty"):
        list_files([f"{tmp_path}/*.txt"], "training.data.train")


def test_a_store_without_its_module_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"pip install 'pylon-training\[gcs\]'"):
        list_files(["gs://bucket/*.txt"], "training.data.train")


class NoCredentialsError(Exception):
    """As botocore names it."""


class Refused(OSError):
    """As the clients of Google, Azure and HTTP answer."""

    def __init__(self, **status: int) -> None:
        super().__init__("Forbidden")
        vars(self).update(status)


@pytest.mark.parametrize(
    ("cause", "error", "says"),
    [
        (NoCredentialsError("Unable to locate credentials"), DataError, "credentials missing"),
        (Refused(code=401), DataError, "credentials missing or refused (Forbidden)"),
        (Refused(status_code=403), DataError, "credentials missing or refused"),
        (Refused(status=503), StorageError, "cannot be read"),
        (PermissionError("Forbidden"), DataError, "access denied"),
        (FileNotFoundError("gone"), DataError, "no such file"),
        (ConnectionResetError("reset"), StorageError, "cannot be read (reset)"),
    ],
)
def test_a_stores_errors_are_told_apart(cause: Exception, error: type[TrainerError], says: str) -> None:
    with pytest.raises(error) as refused, explained("s3://bucket/a.txt"):
        raise cause
    assert says in str(refused.value)
    assert refused.value.__cause__ is cause


def test_what_is_no_stores_error_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), explained("s3://bucket/a.txt"):
        raise ZeroDivisionError
