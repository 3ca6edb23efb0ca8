"""The writer in a process and in threads: what it is given ends whole and durable, or failed with nothing left."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from gangs import fork, wait
from s3_faults import FaultyStore, Refuse

from pylon_trainer.checkpoint import disk, retries, uploads, writer_process
from pylon_trainer.checkpoint.archive import Archive
from pylon_trainer.checkpoint.manifest import PART_BYTES, FileEntry, Manifest, checksum
from pylon_trainer.checkpoint.orders import Begin, Committed, Durable, End, Failed
from pylon_trainer.checkpoint.storage import Storage
from pylon_trainer.checkpoint.writer_handle import WriterHandle
from pylon_trainer.checkpoint.writer_process import WriterProcess
from pylon_trainer.errors import ConfigError, PeerLost, StorageError

SIZE = PART_BYTES + 10
DEADLINE_SECONDS = 30.0


class Arena:
    """Shared memory with a file's bytes."""

    def __init__(self) -> None:
        self.size_bytes = SIZE
        self.fd = os.memfd_create("arena")
        os.ftruncate(self.fd, SIZE)
        self.memory = mmap.mmap(self.fd, SIZE)
        self.memory[-100:] = os.urandom(100)
        self.buffer = memoryview(self.memory)

    def close(self) -> None:
        self.buffer.release()
        self.memory.close()
        os.close(self.fd)


@dataclass
class Save:
    """A handle and what it told."""

    arena: Arena
    handle: WriterHandle
    taken: list[tuple[int, int]] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)

    def begin(self, upload: int, uri: object, path: str = "step/file") -> None:
        self.handle.begin(upload, str(uri), path, SIZE)

    def fill(self, upload: int) -> None:
        for offset in range(0, SIZE, PART_BYTES):
            self.handle.part(upload, offset, offset, min(PART_BYTES, SIZE - offset))

    def ending(self) -> End:
        assert self.handle.wait(DEADLINE_SECONDS), "no answer"
        (ending,) = self.handle.poll()
        return ending

    @property
    def pid(self) -> int:
        eventually(lambda: self.handle._peer.pid is not None)  # type: ignore[attr-defined]
        return int(self.handle._peer.pid)  # type: ignore[attr-defined]


def eventually(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not is_so():
        assert time.monotonic() < deadline, "it never came to pass"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena()
    yield arena
    arena.close()


@pytest.fixture
def open_writer(arena: Arena) -> Iterator[Callable[..., Save]]:
    saves = []

    def open_(build: Callable[[Any], WriterHandle] = WriterHandle.in_process) -> Save:
        save = Save(arena, build(arena))
        save.handle.listen(lambda *part: save.taken.append(part), save.ended.append)
        saves.append(save)
        return save

    yield open_
    for save in saves:
        save.handle.close(5)


BUILDS = pytest.mark.parametrize(
    "build", [WriterHandle.in_thread, WriterHandle.in_process], ids=["in_thread", "in_process"]
)
STORES = {
    "disk in_thread": (WriterHandle.in_thread, "{path}"),
    "disk in_process": (WriterHandle.in_process, "{path}"),
    "memory in_thread": (WriterHandle.in_thread, "memory://{name}"),
}
TARGETS = pytest.mark.parametrize(("build", "uri"), STORES.values(), ids=STORES)
TARGETS_AND_S3 = pytest.mark.parametrize(
    ("build", "uri"),
    [*STORES.values(), (WriterHandle.in_thread, "s3://bucket/job"), (WriterHandle.in_process, "s3://bucket/job")],
    ids=[*STORES, "s3 in_thread", "s3 in_process"],
)


@pytest.fixture
def target(uri: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """The URI of an empty directory of a store of each kind."""
    if uri.startswith("s3"):
        request.getfixturevalue("s3")
    return uri.format(path=tmp_path, name=tmp_path.name)


@TARGETS_AND_S3
def test_a_file_is_durable_with_the_checksum_of_each_part(build: Any, target: str, open_writer: Any) -> None:
    save = open_writer(build)
    save.begin(1, target)
    save.fill(1)
    content = bytes(save.arena.buffer)
    parts = (content[:PART_BYTES], content[PART_BYTES:])
    assert save.ending() == Durable(1, FileEntry(SIZE, PART_BYTES, tuple(map(checksum, parts))))
    assert Storage(target).read("step/file") == content
    assert (sorted(save.taken), save.ended) == ([(1, 0), (1, PART_BYTES)], [1])


@TARGETS
def test_a_file_that_is_given_up_is_gone(build: Any, target: str, open_writer: Any) -> None:
    save = open_writer(build)
    save.begin(1, target)
    save.handle.part(1, 0, 0, PART_BYTES)
    save.handle.cancel(1)
    assert save.ending() == Failed(1, f"{target}/step/file was given up", StorageError)
    save.handle.part(1, PART_BYTES, PART_BYTES, 10)
    assert set(save.ended) == {1}
    assert Storage(target).size("step/file") is None
    save.begin(2, target)
    save.fill(2)
    assert isinstance(save.ending(), Durable)


@BUILDS
def test_a_file_that_cannot_be_written_fails_alone(build: Any, tmp_path: Path, open_writer: Any) -> None:
    (tmp_path / "file").write_text("in the way")
    save = open_writer(build)
    save.begin(1, tmp_path / "file")
    save.fill(1)
    failed = save.ending()
    assert isinstance(failed, Failed)
    assert failed.message.startswith(f"cannot write {tmp_path}/file/step/file: ")
    assert isinstance(failed.error(), StorageError)
    save.begin(2, tmp_path / "directory")
    save.fill(2)
    assert isinstance(save.ending(), Durable)


@BUILDS
def test_nothing_is_overwritten(build: Any, tmp_path: Path, open_writer: Any) -> None:
    Storage(str(tmp_path)).write("step/file", b"of another")
    save = open_writer(build)
    save.begin(1, tmp_path)
    save.fill(1)
    assert isinstance(save.ending(), Failed)
    assert Storage(str(tmp_path)).read("step/file") == b"of another"


def test_a_full_disk_keeps_nothing_of_the_file(
    tmp_path: Path, open_writer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if offset >= PART_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, offset)

    write = os.pwrite
    monkeypatch.setattr(disk.os, "pwrite", pwrite)
    save = open_writer(WriterHandle.in_thread)
    save.begin(1, tmp_path)
    save.fill(1)
    failed = save.ending()
    assert isinstance(failed, Failed)
    assert (
        failed.message == f"cannot write {tmp_path}/step/file: no space left there; free some or lower checkpoint.keep"
    )
    assert list((tmp_path / "step").iterdir()) == []


def test_a_disk_that_refuses_even_to_close_is_told(
    tmp_path: Path, open_writer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As network disks do that are full."""

    def refuse(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(disk, "_write_all", lambda *_: refuse(0))
    monkeypatch.setattr(disk.DiskUpload, "_close", lambda _: refuse(0))
    save = open_writer(WriterHandle.in_thread)
    save.begin(1, tmp_path)
    save.fill(1)
    failed = save.ending()
    assert isinstance(failed, Failed)
    assert failed.message == f"cannot write {tmp_path}/step/file: [Errno 5] Input/output error"
    assert list((tmp_path / "step").iterdir()) == []


def test_one_thread_writes_a_stream(open_writer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With several, one could wait for a part before it that another has given up."""
    threads = []
    put = uploads.StreamUpload.put
    monkeypatch.setattr(
        uploads.StreamUpload, "put", lambda *part: (threads.append(threading.current_thread().name), put(*part))
    )
    save = open_writer(WriterHandle.in_thread)
    save.begin(1, "memory://stream")
    save.fill(1)
    assert isinstance(save.ending(), Durable)
    assert threads == ["upload-1_0"] * 2


def test_a_write_that_the_kernel_cuts_short_keeps_nothing_of_the_file(tmp_path: Path, open_writer: Any) -> None:
    save = open_writer()
    resource.prlimit(save.pid, resource.RLIMIT_FSIZE, (PART_BYTES // 2, PART_BYTES // 2))
    save.begin(1, tmp_path)
    save.fill(1)
    failed = save.ending()
    assert isinstance(failed, Failed)
    assert failed.message == f"cannot write {tmp_path}/step/file: [Errno 27] File too large"
    assert list((tmp_path / "step").iterdir()) == []


def test_a_store_that_is_down_holds_up_no_other_and_can_be_given_up(
    s3: FaultyStore, tmp_path: Path, open_writer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "RETRY_DELAYS_SECONDS", (3 * DEADLINE_SECONDS,))
    s3.faults.append(Refuse(method="POST", times=1_000, status=500, code="InternalError"))
    save = open_writer(WriterHandle.in_thread)
    save.begin(1, "s3://bucket/job")
    save.fill(1)
    eventually(lambda: s3.count("POST"))
    save.begin(2, tmp_path)
    save.fill(2)
    assert isinstance(save.ending(), Durable)
    save.handle.cancel(1)
    assert isinstance(save.ending(), Failed)


@BUILDS
def test_refused_credentials_are_a_matter_of_configuration(build: Any, s3: FaultyStore, open_writer: Any) -> None:
    s3.faults += [Refuse(method=method, times=1_000, status=403, code="AccessDenied") for method in ("POST", "DELETE")]
    save = open_writer(build)
    save.begin(1, "s3://bucket/job")
    save.fill(1)
    failed = save.ending()
    assert isinstance(failed, Failed)
    assert isinstance(failed.error(), ConfigError)
    assert failed.message == (
        "cannot write s3://bucket/job/step/file: credentials missing or refused (AccessDenied); "
        "give them to the pods from a Secret"
    )


@TARGETS
def test_commits_count_in_order_and_remove_what_is_older(build: Any, target: str, open_writer: Any) -> None:
    save = open_writer(build)
    archive = Archive(Storage(target), attempt=1, keep=1)
    archive.claim()
    names = [archive.new_name(step) for step in (1, 2)]
    for upload, name in enumerate(names):
        save.begin(upload, target, f"{name}/rank-00000.safetensors")
        save.fill(upload)
        durable = save.ending()
        assert isinstance(durable, Durable)
        manifest = Manifest(upload + 1, 1, 1, {"rank-00000.safetensors": durable.entry}, {}, [{}])
        save.handle.commit(upload, target, 1, 1, name, manifest)
        committed = save.ending()
        assert isinstance(committed, Committed)
        assert (committed.report.step, committed.report.uri) == (upload + 1, f"{target}/{name}")
    eventually(lambda: [listed.name for listed in archive.checkpoints()] == names[1:])
    assert archive.load(names[1]).manifest == manifest
    save.handle.discard(target, 1, 1, names[1])
    eventually(lambda: archive.checkpoints() == [])


@BUILDS
def test_a_superseded_attempt_learns_so(build: Any, tmp_path: Path, open_writer: Any) -> None:
    Archive(Storage(str(tmp_path)), attempt=2, keep=1).claim()
    save = open_writer(build)
    name = Archive(Storage(str(tmp_path)), attempt=1, keep=1).new_name(3)
    save.handle.commit(7, str(tmp_path), 1, 1, name, Manifest(3, 1, 1, {}, {}, [{}]))
    failed = save.ending()
    assert isinstance(failed, Failed)
    assert failed.upload == 7
    assert isinstance(failed.error(), PeerLost)


def test_the_end_waits_for_what_the_last_commit_made_superfluous_to_be_removed(
    tmp_path: Path, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, is_done = threading.Event(), threading.Event()

    def prune(_: Archive) -> None:
        goes_on.wait(DEADLINE_SECONDS)
        is_done.set()

    def closed_after_commit(timeout_seconds: float) -> bool:
        save = Save(arena, WriterHandle.in_thread(arena))
        name = Archive(Storage(str(tmp_path)), attempt=1, keep=1).new_name(3)
        save.handle.commit(7, str(tmp_path), 1, 1, name, Manifest(3, 1, 1, {}, {}, [{}]))
        assert isinstance(save.ending(), Committed)
        return save.handle.close(timeout_seconds)

    monkeypatch.setattr(Archive, "prune", prune)
    assert not closed_after_commit(0.1)
    goes_on.set()
    eventually(is_done.is_set)
    is_done.clear()
    assert closed_after_commit(DEADLINE_SECONDS)
    assert is_done.is_set()


def test_a_clean_up_that_fails_in_a_way_nobody_foresaw_is_told(
    tmp_path: Path, open_writer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: Archive) -> None:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(Archive, "prune", fail)
    save = open_writer(WriterHandle.in_thread)
    name = Archive(Storage(str(tmp_path)), attempt=1, keep=1).new_name(3)
    save.handle.commit(7, str(tmp_path), 1, 1, name, Manifest(3, 1, 1, {}, {}, [{}]))
    assert isinstance(save.ending(), Committed)
    eventually(lambda: "unforeseen" in caplog.text)


@BUILDS
@pytest.mark.parametrize("leaves_work", [False, True])
def test_nothing_is_left_behind(build: Any, leaves_work: bool, arena: Arena, tmp_path: Path) -> None:
    def files() -> list[str]:
        """Without sockets: those of the S3 server come and go."""
        found = [str(file.readlink()) for file in list(Path("/proc/self/fd").iterdir()) if file.is_symlink()]
        return sorted(name for name in found if not name.startswith("socket:"))

    gc.collect()  # what other tests left
    threads, before = threading.active_count(), files()
    handle = build(arena)
    save = Save(arena, handle)
    save.begin(1, tmp_path)
    save.fill(1)
    assert isinstance(save.ending(), Durable)
    pid = getattr(handle._peer, "pid", None)
    if leaves_work:
        save.begin(2, tmp_path, "step/half")
        save.handle.part(2, 0, 0, PART_BYTES)
    assert handle.close(DEADLINE_SECONDS)
    eventually(lambda: threading.active_count() == threads)
    assert files() == before
    assert pid is None or not is_running(pid)
    assert [path.name for path in (tmp_path / "step").iterdir()] == ["file"]


def test_a_store_of_this_process_is_written_from_within_it(open_writer: Any) -> None:
    before = threading.active_count()
    assert (
        open_writer(lambda arena: WriterHandle.open(arena, ["/disk", "memory://x"])).handle._peer.__class__.__name__
        == "Writer"
    )
    assert threading.active_count() == before
    assert open_writer(lambda arena: WriterHandle.open(arena, ["/disk", "s3://x"])).pid


# --- The process ---


def test_a_killed_writer_fails_what_it_had_and_the_next_save_has_a_new_one(tmp_path: Path, open_writer: Any) -> None:
    save = open_writer()
    killed = save.pid
    save.begin(1, tmp_path, "step/one")
    save.begin(2, tmp_path, "step/two")
    save.fill(1)
    assert isinstance(save.ending(), Durable)
    os.kill(killed, signal.SIGKILL)
    assert save.ending() == Failed(
        2, "the writer process ended by signal 9; the next save starts a new one", StorageError
    )
    save.fill(2)
    save.begin(3, tmp_path, "step/three")
    save.fill(3)
    assert isinstance(save.ending(), Durable)
    assert save.pid != killed
    assert set(save.ended) == {1, 2, 3}


def test_orders_around_a_death_have_one_ending_each(tmp_path: Path, open_writer: Any) -> None:
    """Whichever comes first, the order or the news."""
    save = open_writer()
    for upload in range(0, 10, 2):
        save.begin(upload, tmp_path, f"step/{upload}")
        os.kill(save.pid, signal.SIGKILL)
        save.begin(upload + 1, tmp_path, f"step/{upload + 1}")
        save.fill(upload + 1)
        eventually(lambda upload=upload: len(save.ended) == upload + 2)
    assert sorted(save.ended) == list(range(10))
    endings = {ending.upload: ending for ending in save.handle.poll()}
    assert all(isinstance(endings[upload], Failed) for upload in range(0, 10, 2))


def test_orders_that_failed_before_they_were_sent_are_never_carried_out(tmp_path: Path, open_writer: Any) -> None:
    save = open_writer()
    os.kill(save.pid, signal.SIGSTOP)
    save.begin(1, tmp_path, "step/one")
    for _ in range(2_000):  # more than a pipe holds
        save.fill(1)
    save.begin(2, tmp_path, "step/two")
    os.kill(save.pid, signal.SIGKILL)
    eventually(lambda: save.ended == [1, 2])
    save.begin(3, tmp_path, "step/three")
    save.fill(3)
    eventually(lambda: save.ended == [1, 2, 3])
    assert [path.name for path in (tmp_path / "step").iterdir()] == ["three"]


def test_an_order_that_failed_just_before_it_was_sent_is_not_carried_out(tmp_path: Path, arena: Arena) -> None:
    """The news of the death comes between the question whether the order stands and the new process."""
    lost, asked = threading.Event(), threading.Event()

    def died(_: str) -> None:
        assert asked.wait(DEADLINE_SECONDS)
        lost.set()

    def is_wanted(_: object) -> bool:
        stands = not lost.is_set()
        asked.set()
        return stands

    process = WriterProcess(arena, lambda _: None, died, is_wanted)
    eventually(lambda: process.pid)
    os.kill(process.pid or 0, signal.SIGKILL)
    eventually(lambda: process.pid is None)
    process.handle(Begin(1, str(tmp_path), "step/file", SIZE))
    assert process.close(DEADLINE_SECONDS)
    assert lost.is_set()
    assert list(tmp_path.iterdir()) == []


def test_signals_to_stop_do_not_end_it(tmp_path: Path, open_writer: Any) -> None:
    save = open_writer()
    save.begin(1, tmp_path, "step/one")
    save.fill(1)
    assert isinstance(save.ending(), Durable)
    pid = save.pid
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
    save.begin(2, tmp_path, "step/two")
    save.fill(2)
    assert isinstance(save.ending(), Durable)
    assert save.pid == pid
    assert os.getpgid(pid) != os.getpgid(0), "Ctrl-C before it can ignore signals would end it"


def test_it_dies_with_its_rank(tmp_path: Path) -> None:
    """Even when somebody else holds the pipes open, as a process that the rank forked does."""

    def run() -> None:
        arena = Arena()
        save = Save(arena, WriterHandle.in_process(arena))
        save.handle.listen(lambda *part: save.taken.append(part), save.ended.append)
        save.begin(1, tmp_path)
        save.handle.part(1, 0, 0, PART_BYTES)
        eventually(lambda: save.taken)
        (tmp_path / "pid").write_text(str(save.pid))
        (tmp_path / "sleeper").write_text(str(fork(lambda: time.sleep(2 * DEADLINE_SECONDS))))
        os.kill(os.getpid(), signal.SIGKILL)

    assert wait(fork(run)) == 128 + signal.SIGKILL
    pid = int((tmp_path / "pid").read_text())
    eventually(lambda: not is_running(pid))
    os.kill(int((tmp_path / "sleeper").read_text()), signal.SIGKILL)


@pytest.mark.parametrize("last_words", [b"", b"\0\0\1\0half"], ids=["none", "cut"])
def test_it_ends_when_nobody_can_give_it_orders_any_more(arena: Arena, last_words: bytes) -> None:
    orders_reader, orders_writer = os.pipe()
    answers_reader, answers_writer = os.pipe()
    inherited = (orders_reader, answers_writer, arena.fd)
    command = [sys.executable, "-m", "pylon_trainer.checkpoint.writer_process"]
    process = subprocess.Popen(
        [*command, *map(str, (*inherited, arena.size_bytes, os.getpid()))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        pass_fds=inherited,
        stderr=subprocess.PIPE,
    )
    os.write(orders_writer, last_words)
    for descriptor in (orders_reader, orders_writer, answers_reader, answers_writer):
        os.close(descriptor)
    assert process.communicate(timeout=DEADLINE_SECONDS) == (None, b"")
    assert process.returncode == 0


def test_a_writer_that_hangs_holds_up_neither_orders_nor_the_end(tmp_path: Path, open_writer: Any) -> None:
    save = open_writer()
    pid = save.pid
    os.kill(pid, signal.SIGSTOP)
    save.begin(1, tmp_path)
    for _ in range(2_000):  # more than a pipe holds
        save.fill(1)
    assert not save.handle.close(0.1)
    assert not is_running(pid)
    assert isinstance(save.ending(), Failed)


def test_a_writer_that_cannot_even_be_killed_does_not_hold_up_the_end(
    open_writer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a process that waits inside the driver of a broken disk."""
    monkeypatch.setattr(writer_process, "_KILL_SECONDS", 0.1)
    monkeypatch.setattr(subprocess.Popen, "kill", lambda _: None)
    save = open_writer()
    pid = save.pid
    os.kill(pid, signal.SIGSTOP)
    ending = threading.Thread(target=save.handle.close, args=(0.1,), daemon=True)
    ending.start()
    ending.join(DEADLINE_SECONDS)
    has_ended = not ending.is_alive()
    os.kill(pid, signal.SIGKILL)
    assert has_ended


def test_it_needs_no_torch() -> None:
    heavy = {"torch", "numpy", "transformers", "s3fs", "botocore", "aiohttp"}
    program = f"import sys, pylon_trainer.checkpoint.writer_process; sys.exit(str({heavy} & sys.modules.keys()))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert ended.stderr == "set()\n"
