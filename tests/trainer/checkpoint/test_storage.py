"""Stores: what they refuse, in one line; what they do again."""

from __future__ import annotations

import errno
import os
import resource
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
