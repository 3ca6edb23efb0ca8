"""Stores: what they refuse, in one line; what they do again."""

from __future__ import annotations

import errno
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from gangs import fork, wait

from pylon_trainer.checkpoint.retries import RETRY_DELAYS_SECONDS
from pylon_trainer.checkpoint.storage import Storage
from pylon_trainer.errors import ConfigError, StorageError


class NoCredentialsError(Exception):
    """Named as botocore's is."""


class TroubledFileSystem(MemoryFileSystem):
    """A store that fails its next operations, one error each."""

    protocol = "troubled"
    store: dict[str, object] = {}
    troubles: list[Exception] = []

    def _open(self, path, mode="rb", **kwargs):  # type: ignore[no-untyped-def]
        if self.troubles:
            raise self.troubles.pop(0)
        return super()._open(path, mode, **kwargs)


@pytest.fixture(autouse=True)
def troubles() -> list[Exception]:
    fsspec.register_implementation("troubled", TroubledFileSystem, clobber=True)
    TroubledFileSystem.troubles.clear()
    return TroubledFileSystem.troubles


@pytest.mark.parametrize("uri", ["{path}", "file://{path}", "troubled://bucket/{name}"])
def test_what_is_written_is_read_listed_and_removed(tmp_path: Path, uri: str) -> None:
    storage = Storage(uri.format(path=tmp_path / "deep" / "er", name=tmp_path.name) + "/")
    assert storage.names() == []
    storage.write("a/b/one", b"1")
    storage.write("a/two", b"22")
    storage.write("a/two", b"2")
    assert (storage.names(), storage.names("a"), storage.names("a/b")) == (["a"], ["b", "two"], ["one"])
    assert (storage.read("a/b/one"), storage.read("a/two")) == (b"1", b"2")
    storage.remove("a/b")
    assert storage.names("a") == ["two"]
    storage.remove("a/b")
    with pytest.raises(FileNotFoundError):
        storage.read("a/b/one")


STORES = pytest.mark.parametrize("uri", ["{path}", "file://{path}", "memory://{name}", "troubled://bucket/{name}"])


@STORES
def test_what_is_created_is_there_once(tmp_path: Path, uri: str) -> None:
    storage = Storage(uri.format(path=tmp_path, name=tmp_path.name))
    storage.create("a/marker", b"mine")
    for theirs in (b"mine", b"theirs"):
        with pytest.raises(FileExistsError):
            storage.create("a/marker", theirs)
    assert (storage.read("a/marker"), storage.size("a/marker")) == (b"mine", 4)
    assert (storage.size("a/none"), storage.size("a")) == (None, None)


def test_a_creation_whose_answer_was_lost_is_ours(troubles: list[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def lose_the_answer(self: TroubledFileSystem, path: str, data: bytes, mode: str) -> None:
        pipe_file(self, path, data, mode)
        if troubles:
            raise troubles.pop()

    pipe_file = TroubledFileSystem.pipe_file
    monkeypatch.setattr(TroubledFileSystem, "pipe_file", lose_the_answer)
    storage = Storage("troubled://lossy", sleep=lambda _: None)
    troubles += [ConnectionError("connection reset")]
    storage.create("marker", b"mine")
    troubles += [ConnectionError("connection reset")]
    with pytest.raises(FileExistsError):
        storage.create("marker", b"theirs")
    assert storage.read("marker") == b"mine"


@STORES
def test_ranges_are_read_whole_or_not_at_all(tmp_path: Path, uri: str) -> None:
    storage = Storage(uri.format(path=tmp_path, name=tmp_path.name))
    storage.write("file", b"0123456789")
    buffer = bytearray(4)
    storage.read_into("file", 3, memoryview(buffer))
    assert buffer == b"3456"
    for offset in (7, 20):
        with pytest.raises(EOFError):
            storage.read_into("file", offset, memoryview(buffer))
    with pytest.raises(FileNotFoundError):
        storage.read_into("none", 0, memoryview(buffer))


@STORES
def test_a_file_that_comes_in_parts_is_whole_or_gone(tmp_path: Path, uri: str) -> None:
    storage = Storage(uri.format(path=tmp_path, name=tmp_path.name))
    for path in ("a/whole", "a/given-up"):
        upload = storage.upload(path, 7)
        upload.put(0, memoryview(b"0123"))
        if path == "a/whole":
            upload.put(4, memoryview(b"456"))
            upload.finish()
        else:
            upload.abort()
    storage.abandon_uploads("a")
    assert storage.names("a") == ["whole"]
    assert storage.read("a/whole") == b"0123456"


@STORES
def test_a_stream_waits_for_the_parts_before_and_others_need_not(tmp_path: Path, uri: str) -> None:
    upload = Storage(uri.format(path=tmp_path, name=tmp_path.name)).upload("file", 6)
    with ThreadPoolExecutor(3) as threads:
        parts = {4: b"45", 2: b"23", 0: b"01"}
        list(threads.map(lambda offset: upload.put(offset, memoryview(parts[offset])), parts))
    upload.finish()
    assert Storage(uri.format(path=tmp_path, name=tmp_path.name)).read("file") == b"012345"


def test_a_stream_that_broke_lets_nobody_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> int:
        raise ConnectionError("connection reset")

    upload = Storage("troubled://broken").upload("file", 4)
    monkeypatch.setattr(upload._file, "write", refuse)  # type: ignore[attr-defined]
    with ThreadPoolExecutor(2) as threads:
        later = threads.submit(upload.put, 2, memoryview(b"23"))
        for part in (threads.submit(upload.put, 0, memoryview(b"01")), later):
            with pytest.raises(StorageError, match="cannot write troubled://broken/file: "):
                part.result(10)
    upload.abort()
    assert Storage("troubled://broken").names() == []


def test_a_store_that_lost_a_part_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    upload = Storage("troubled://lossy").upload("short", 4)
    upload.put(0, memoryview(b"01"))
    with pytest.raises(StorageError, match="troubled://lossy/short: the store holds 2 bytes instead of 4"):
        upload.finish()
    monkeypatch.setattr(TroubledFileSystem, "pipe_file", lambda self, path, data: self.open(path, "wb", data=data[1:]))
    with pytest.raises(StorageError, match="troubled://lossy/file: the store holds 3 bytes instead of 4"):
        Storage("troubled://lossy", sleep=lambda _: None).write("file", b"0123")


@pytest.mark.parametrize("scheme", ["s3", "https", "ftp"])
def test_a_password_in_a_uri_is_refused_and_not_repeated(scheme: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        Storage(f"{scheme}://AKIAUSER:hunter2@bucket/job")
    assert str(refusal.value) == (
        f"{scheme}://bucket/job: this URI held a password; give credentials to the pods from a Secret"
    )


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s4://bucket/x", ["s4://bucket/x", "unknown scheme s4://", "s3://", "gs://"]),
        ("http2:///x", ["unknown scheme http2://"]),
    ],
)
def test_an_unknown_scheme_is_named_with_the_known_ones(uri: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        Storage(uri)
    assert all(word in str(refusal.value) for word in words)


def test_a_missing_client_is_named_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", fail)
    with pytest.raises(ConfigError, match=r"pip install 'pylon-training\[s3\]'"):
        Storage("s3://bucket/x")


def test_a_busy_store_is_asked_again_with_growing_waits(troubles: list[Exception]) -> None:
    waits: list[float] = []
    storage = Storage("troubled://busy", sleep=waits.append)
    troubles += [OSError("SlowDown: reduce your request rate"), TimeoutError("timed out")]
    storage.write("x", b"data")
    assert storage.read("x") == b"data"
    assert len(waits) == 2
    assert all(most / 2 <= wait <= most for wait, most in zip(waits, RETRY_DELAYS_SECONDS, strict=False))


def test_a_store_that_stays_broken_is_given_up_with_one_line(troubles: list[Exception]) -> None:
    storage = Storage("troubled://broken", sleep=lambda _: None)
    troubles += [ConnectionError("connection reset\nlong trace")] * 9
    with pytest.raises(StorageError, match=r"^cannot write troubled://broken/x: connection reset$"):
        storage.write("x", b"data")


def test_missing_credentials_are_the_users_to_mend_and_not_tried_again(troubles: list[Exception]) -> None:
    waits: list[float] = []
    troubles += [NoCredentialsError("Unable to locate credentials")]
    with pytest.raises(ConfigError, match=r"missing or refused .Unable to locate credentials.; give them to the pods"):
        Storage("troubled://private", sleep=waits.append).write("x", b"data")
    assert waits == []


def test_a_full_store_is_said_to_be_full_and_not_tried_again(troubles: list[Exception]) -> None:
    waits: list[float] = []
    troubles += [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))]
    with pytest.raises(StorageError, match="cannot write troubled://full/x: no space left there"):
        Storage("troubled://full", sleep=waits.append).write("x", b"data")
    assert waits == []


def test_a_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        Storage(str(tmp_path / "file"), sleep=lambda _: None).write("x", b"data")


def test_a_write_that_the_kernel_cuts_short_is_an_error(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes a real write fail in the middle, as a quota does."""

    def run() -> None:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            Storage(str(tmp_path)).write("x", b"." * 5000)
        except StorageError:
            os._exit(0)

    assert wait(fork(run)) == 0
