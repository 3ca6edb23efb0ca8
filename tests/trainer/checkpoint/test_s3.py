"""S3, with a real server and a bad connection to it: whole and durable, or one clear line and nothing left."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import s3fs
from s3_faults import CutAnswer, CutRequest, Fault, FaultyStore, Flip, Hide, HoldBack, Misstate, Refuse, Shorten
from s3_server import ENVIRONMENT

from pylon_trainer.checkpoint import s3 as s3_module
from pylon_trainer.checkpoint.archive import Archive
from pylon_trainer.checkpoint.audit import read_part
from pylon_trainer.checkpoint.manifest import Manifest, Part, checksum
from pylon_trainer.checkpoint.retries import RETRY_DELAYS_SECONDS
from pylon_trainer.checkpoint.storage import Storage
from pylon_trainer.errors import ConfigError, StorageError

PART_BYTES = 1000
DATA = os.urandom(3 * PART_BYTES + 10)
ALWAYS = 1_000
SECOND = "partNumber=2"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_module, "PART_BYTES", PART_BYTES)


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def storage(s3: FaultyStore, waits: list[float]) -> Storage:
    return Storage("s3://bucket/job", sleep=waits.append)


def upload(storage: Storage, path: str, data: bytes = DATA) -> None:
    """All parts at once, as the writer sends them; what fails is given up."""
    upload = storage.upload(path, len(data))
    parts = [(offset, memoryview(data)[offset : offset + PART_BYTES]) for offset in range(0, len(data), PART_BYTES)]
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda part: upload.put(*part), parts))
        upload.finish()
    except (StorageError, ConfigError):
        upload.abort()
        raise


def unfinished() -> list[str]:
    """Keys of the multipart uploads that the server knows and nobody finished."""
    found = s3fs.S3FileSystem(use_listings_cache=False).list_multipart_uploads("bucket")
    return [upload["Key"] for upload in found]


@pytest.mark.parametrize(
    ("fault", "tries"),
    [
        (None, 1),
        (Refuse(holds=SECOND, status=500, code="InternalError"), 2),
        (Refuse(holds=SECOND, times=3), 4),
        (CutRequest(holds=SECOND, times=2), 3),
        (CutAnswer(holds=SECOND), 2),
        (HoldBack(holds=SECOND, until="partNumber=4"), 1),
        (Refuse(method="POST", holds="uploads"), 1),
        (CutAnswer(method="POST", holds="uploads"), 1),
        (Refuse(method="POST", holds="uploadId="), 1),
        (CutAnswer(method="POST", holds="uploadId="), 1),
        (Refuse(method="POST", holds="uploadId=", status=501, code="NotImplemented"), 1),
        (Refuse(method="HEAD", status=500, code="InternalError"), 1),
        (Misstate(method="HEAD"), 1),
    ],
    ids=repr,
)
def test_a_file_in_parts_ends_whole_and_only_what_failed_is_sent_again(
    s3: FaultyStore, storage: Storage, fault: Fault | None, tries: int
) -> None:
    s3.faults += [fault] if fault else []
    upload(storage, "step/file")
    assert storage.read("step/file") == DATA
    assert s3.count("PUT", SECOND) == tries
    assert [s3.count("PUT", f"partNumber={number}") for number in (1, 3, 4)] == [1, 1, 1]
    assert fault is None or fault.times == 0, "the fault was never met"


@pytest.mark.parametrize("fault", [Refuse(), CutRequest(), CutAnswer(), Misstate(method="HEAD")], ids=repr)
def test_a_file_of_one_part_is_one_request(s3: FaultyStore, storage: Storage, fault: Fault) -> None:
    s3.faults.append(fault)
    upload(storage, "step/small", b"small")
    assert storage.read("step/small") == b"small"
    assert s3.count("PUT") <= 2
    assert s3.count("POST") == 0


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Refuse(holds=SECOND, times=ALWAYS, status=500, code="InternalError", message="We\nfailed"), "We"),
        (CutRequest(holds=SECOND, times=ALWAYS), "onnection"),
        (Refuse(method="POST", holds="uploads", times=ALWAYS), "reduce your request rate"),
        (Refuse(method="POST", holds="uploadId=", times=ALWAYS), "reduce your request rate"),
        (Refuse(holds=SECOND, status=404, code="NoSuchBucket", message="no such bucket"), "no such bucket"),
        (Misstate(method="HEAD", times=ALWAYS), "the store holds 3011 bytes instead of 3010"),
    ],
    ids=repr,
)
def test_what_cannot_be_sent_ends_in_one_line_and_leaves_nothing(
    s3: FaultyStore, storage: Storage, fault: Fault, words: str
) -> None:
    s3.faults.append(fault)
    with pytest.raises(StorageError) as failure:
        upload(storage, "step/file")
    line = str(failure.value)
    assert line.startswith("cannot write s3://bucket/job/step/file: ")
    assert words in line
    assert "\n" not in line
    s3.reset()
    assert storage.names("step") == []
    assert unfinished() == []


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (503, "ServiceUnavailable"), (400, "SlowDown")])
def test_a_store_that_says_slow_down_gets_longer_waits(
    s3: FaultyStore, storage: Storage, waits: list[float], status: int, code: str
) -> None:
    s3.faults.append(Refuse(holds=SECOND, times=3, status=status, code=code))
    upload(storage, "step/file")
    assert all(most <= wait <= 2 * most for wait, most in zip(waits, RETRY_DELAYS_SECONDS, strict=False))
    assert len(waits) == 3


def test_an_upload_overwrites_nothing(storage: Storage) -> None:
    storage.write("step/file", b"of another")
    with pytest.raises(StorageError, match="cannot write s3://bucket/job/step/file"):
        upload(storage, "step/file")
    assert storage.read("step/file") == b"of another"
    assert unfinished() == []


@pytest.mark.parametrize("data", [DATA, DATA[:10]], ids=["in parts", "of one part"])
def test_an_upload_overwrites_nothing_even_where_the_store_knows_no_condition(
    s3: FaultyStore, storage: Storage, waits: list[float], data: bytes
) -> None:
    of_another = bytes(len(data))  # as long as the new one, so that its length tells nothing
    storage.write("step/file", of_another)
    s3.faults += [
        Refuse(method=method, holds=holds, times=ALWAYS, status=501, code="NotImplemented")
        for method, holds in (("POST", "uploadId="), ("PUT", "step/file"))
        if (method == "POST") == (len(data) > PART_BYTES)
    ]
    with pytest.raises(StorageError, match="it is there already"):
        upload(storage, "step/file", data)
    assert waits == []
    s3.reset()
    assert storage.read("step/file") == of_another
    assert unfinished() == []


def test_giving_up_an_upload_removes_nothing_of_another(storage: Storage) -> None:
    storage.write("step/file", b"of another")
    given_up = storage.upload("step/file", len(DATA))
    given_up.put(0, memoryview(DATA)[:PART_BYTES])
    given_up.abort()
    assert storage.read("step/file") == b"of another"
    assert unfinished() == []


def test_a_file_of_too_many_parts_is_refused_before_any_is_sent(s3: FaultyStore, storage: Storage) -> None:
    storage.upload("step/file", s3_module.MOST_PARTS * PART_BYTES)
    with pytest.raises(StorageError, match="10000 parts of 1000; train with more processes"):
        storage.upload("step/file", s3_module.MOST_PARTS * PART_BYTES + 1)
    assert s3.count("POST") == 0


@pytest.mark.parametrize(
    "fault",
    [None, Refuse(), CutRequest(), CutAnswer(), Refuse(status=501, code="NotImplemented")],
    ids=repr,
)
def test_a_marker_is_created_once(s3: FaultyStore, storage: Storage, fault: Fault | None) -> None:
    s3.faults += [fault] if fault else []
    storage.create("step/marker", b"mine")
    assert storage.read("step/marker") == b"mine"
    with pytest.raises(FileExistsError):
        storage.create("step/marker", b"theirs")
    with pytest.raises(FileExistsError):
        storage.create("step/marker", b"mine")
    assert storage.read("step/marker") == b"mine"


def test_without_the_condition_a_store_is_asked_whether_the_marker_is_there(s3: FaultyStore, storage: Storage) -> None:
    storage.create("step/marker", b"mine")
    s3.faults.append(Refuse(status=501, code="NotImplemented"))
    with pytest.raises(FileExistsError):
        storage.create("step/marker", b"theirs")
    assert storage.read("step/marker") == b"mine"


@pytest.mark.parametrize(
    "fault",
    [
        None,
        Refuse(method="GET"),
        CutRequest(method="GET"),
        CutAnswer(method="GET"),
        Shorten(method="GET"),
    ],
    ids=repr,
)
def test_ranges_arrive_whole(s3: FaultyStore, storage: Storage, fault: Fault | None) -> None:
    storage.write("step/file", DATA)
    s3.faults += [fault] if fault else []
    buffer = memoryview(bytearray(1500))
    storage.read_into("step/file", 1200, buffer)
    assert buffer == DATA[1200:2700]


@pytest.mark.parametrize(
    ("path", "offset", "error"),
    [("file", 3000, EOFError), ("file", 4000, EOFError), ("none", 0, FileNotFoundError)],
)
def test_a_range_that_is_not_there_is_told_at_once(
    storage: Storage, waits: list[float], path: str, offset: int, error: type[Exception]
) -> None:
    storage.write("file", DATA)
    with pytest.raises(error):
        storage.read_into(path, offset, memoryview(bytearray(20)))
    assert waits == []


def test_what_looks_damaged_is_read_again_over_another_connection(s3: FaultyStore, storage: Storage) -> None:
    upload(storage, "step/file")
    part = Part(0, 0, PART_BYTES, checksum(DATA[:PART_BYTES]))
    s3.reset()
    s3.faults.append(Flip(holds="step/file"))
    data = memoryview(bytearray(PART_BYTES))
    read_part(storage, "step/file", part, data)
    assert bytes(data) == DATA[:PART_BYTES]
    first, second = s3.connections
    assert first is not second


@pytest.mark.parametrize("fault", [Refuse(), CutRequest(), CutAnswer(), Misstate(method="HEAD")], ids=repr)
def test_small_files_are_written_read_listed_measured_and_removed(
    s3: FaultyStore, storage: Storage, fault: Fault
) -> None:
    assert storage.names() == []
    s3.faults.append(fault)
    storage.write("step/one", b"1")
    storage.write("step/two", b"22")
    assert (storage.names(), storage.names("step")) == (["step"], ["one", "two"])
    assert (storage.read("step/two"), storage.size("step/two"), storage.size("step/three")) == (b"22", 2, None)
    storage.remove("step/one")
    assert storage.names("step") == ["two"]
    storage.remove("step")
    storage.remove("step")
    assert storage.names() == []
    with pytest.raises(FileNotFoundError):
        storage.read("step/two")


def test_only_what_was_begun_below_a_directory_is_abandoned(storage: Storage) -> None:
    for path in ("step-1/a", "step-1/b", "step-10/a"):
        storage.upload(path, len(DATA)).put(0, memoryview(DATA)[:PART_BYTES])
    assert unfinished() == ["job/step-1/a", "job/step-1/b", "job/step-10/a"]
    storage.abandon_uploads("step-1")
    assert unfinished() == ["job/step-10/a"]


def test_what_a_listing_does_not_show_yet_is_there_by_its_name(s3: FaultyStore, storage: Storage) -> None:
    storage.write("step/new", b"1")
    s3.faults.append(Hide(key="step", times=ALWAYS))
    assert storage.names("step") == []
    assert storage.read("step/new") == b"1"
    assert storage.size("step/new") == 1


def test_a_commit_that_no_listing_shows_is_found_and_leaves_no_half_of_another(
    s3: FaultyStore, storage: Storage
) -> None:
    archive = Archive(storage, attempt=1, keep=1)
    archive.claim()
    given_up, committed = (archive.new_name(step) for step in (1, 2))
    storage.upload(f"{given_up}/rank", len(DATA)).put(0, memoryview(DATA)[:PART_BYTES])
    s3.faults.append(Hide(key="step-", times=ALWAYS))
    report = archive.commit(committed, Manifest(2, 1, 1, {}, {}, [{}]))
    assert [listed.name for listed in archive.checkpoints()] == [committed]
    assert Archive(storage, attempt=2, keep=1).load(committed).report == report
    archive.discard(given_up)
    assert unfinished() == []


@pytest.mark.parametrize(
    "act",
    [
        lambda storage: upload(storage, "file"),
        lambda storage: storage.write("file", b"1"),
        lambda storage: storage.create("file", b"1"),
        lambda storage: storage.read("file"),
        lambda storage: storage.read_into("file", 0, memoryview(bytearray(1))),
        lambda storage: storage.size("file"),
        lambda storage: storage.names(),
        lambda storage: storage.remove("file"),
        lambda storage: storage.abandon_uploads("file"),
    ],
    ids=["upload", "write", "create", "read", "read_into", "size", "names", "remove", "abandon_uploads"],
)
def test_refused_credentials_are_told_without_them_and_not_tried_again(
    s3: FaultyStore, storage: Storage, waits: list[float], act: Callable[[Storage], object]
) -> None:
    secrets = (ENVIRONMENT["AWS_SECRET_ACCESS_KEY"], ENVIRONMENT["AWS_ACCESS_KEY_ID"])
    for method in ("GET", "PUT", "POST", "HEAD", "DELETE"):
        echo = f"you sent {' and '.join(secrets)}"
        s3.faults.append(Refuse(method=method, times=ALWAYS, status=403, code="SignatureDoesNotMatch", message=echo))
    with pytest.raises(
        ConfigError, match=r"credentials missing or refused .*; give them to the pods from a Secret"
    ) as e:
        act(storage)
    assert not any(secret in str(e.value) for secret in secrets)
    assert waits == []


@pytest.fixture
def new_clients(s3: FaultyStore) -> Iterator[None]:
    """Clients read the environment when they are made; none is kept from or for another test."""

    def forget() -> None:
        s3fs.S3FileSystem.clear_instance_cache()
        s3_module._client.cache_clear()

    forget()
    yield
    forget()


@pytest.mark.usefixtures("new_clients")
def test_credentials_come_from_a_mounted_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    mounted = tmp_path / "credentials"
    mounted.write_text("[default]\naws_access_key_id = AKIAMOUNTED\naws_secret_access_key = from-a-secret\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(mounted))
    storage = Storage("s3://bucket/job")
    storage.write("file", b"1")
    upload(storage, "step/file")
    assert storage.read("step/file") == DATA


@pytest.mark.usefixtures("new_clients")
@pytest.mark.parametrize("act", [upload, Storage.write])
def test_missing_credentials_are_told(
    act: Callable[[Storage, str, bytes], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(ConfigError, match=r"credentials missing or refused .Unable to locate credentials"):
        act(Storage("s3://bucket/job"), "file", DATA)
