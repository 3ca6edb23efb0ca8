from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from pylon_trainer.checkpoint.layout import Layout
from pylon_trainer.checkpoint.slab import Arena, Slabs, page_lock
from pylon_trainer.checkpoint.staging import Staging
from pylon_trainer.checkpoint.state import describe
from pylon_trainer.checkpoint.writer_handle import WriterHandle
from pylon_trainer.errors import StorageError

PART_BYTES = 4096
PLENTY = 1 << 24
WAIT_SECONDS = 60.0
UPLOADS = (3, 8)

Build = Callable[..., tuple[Staging, "FakeWriter"]]


class FakeWriter:
    """Keeps what it is given of each upload, as it was at that moment, and takes it at once or when told."""

    def __init__(self, slabs: Slabs, *, takes: bool) -> None:
        self._slabs = slabs
        self._takes = takes
        self._came = threading.Condition()
        self.files: dict[int, dict[int, bytes]] = {}

    def listen(self, taken: Callable[[int, int], None], ended: Callable[[int], None]) -> None:
        self.taken, self.ended = taken, ended

    def part(self, upload: int, offset_in_file: int, offset_in_arena: int, length: int) -> None:
        data = bytes(self._slabs.arena.buffer[offset_in_arena : offset_in_arena + length])
        with self._came:
            self.files.setdefault(upload, {})[offset_in_file] = data
            self._came.notify_all()
        if self._takes:
            self.taken(upload, offset_in_file)

    def wait_for_parts(self, number: int, upload: int = UPLOADS[0]) -> None:
        with self._came:
            assert self._came.wait_for(lambda: len(self.files.get(upload, ())) >= number, WAIT_SECONDS)

    def file(self, upload: int = UPLOADS[0]) -> bytes:
        parts = self.files[upload]
        assert list(parts) == sorted(parts)
        return b"".join(parts.values())


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def build() -> Iterator[Build]:
    """Builds a staging over slabs for files of the given layout."""
    built: list[tuple[Staging, Slabs]] = []

    def make(
        layout: Layout,
        device: torch.device | str = "cpu",
        budget_bytes: int = PLENTY,
        *,
        takes: bool = True,
        patience_seconds: float = WAIT_SECONDS,
    ) -> tuple[Staging, FakeWriter]:
        slabs = Slabs.open(layout.size_bytes, budget_bytes, PART_BYTES, torch.device(device))
        writer = FakeWriter(slabs, takes=takes)
        staging = Staging(torch.device(device), slabs, writer, writer_patience_seconds=patience_seconds)
        built.append((staging, slabs))
        return staging, writer

    yield make
    for staging, slabs in built:
        assert staging.close(WAIT_SECONDS)
        slabs.close()


def state(device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Tensors of many types, shapes and strides, some larger than a part; one on the CPU in any case."""
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(60, 70, generator=generator)
    return {
        "wide": wide.to(device),
        "transposed": wide.to(device).T,
        "every_other": wide.to(device)[::2, ::3],
        "repeated": torch.arange(5.0, device=device).expand(4, 5),
        "half": wide.to(device, torch.bfloat16),
        "eight": wide[0].to(device).to(torch.float8_e4m3fn),
        "flags": (wide > 0).to(device),
        "scalar": torch.tensor(2.5, dtype=torch.float64, device=device),
        "nothing": torch.empty(3, 0, device=device),
        "on_cpu": torch.arange(4000, dtype=torch.int64),
        "bytes": torch.arange(77, dtype=torch.uint8, device=device),
    }


def layout_of(tensors: dict[str, Tensor]) -> Layout:
    return Layout.of(describe(tensors))


def assert_is_file_of(data: bytes, tensors: dict[str, Tensor]) -> None:
    loaded = safetensors.torch.load(data)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert raw(loaded[name]) == raw(tensor.cpu()), name


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("budget_bytes", [PLENTY, 3 * PART_BYTES, PART_BYTES], ids=["whole", "three parts", "one part"])
def test_what_the_writer_is_given_is_the_file(build: Build, device: torch.device, budget_bytes: int) -> None:
    tensors = state(device)
    layout = layout_of(tensors)
    staging, writer = build(layout, device, budget_bytes)

    for _ in range(3):
        writer.files.clear()
        expected = {name: tensor.clone() for name, tensor in tensors.items()}
        assert staging.wait_for_slab(WAIT_SECONDS)
        staged = staging.begin(tensors, layout, UPLOADS)
        assert staged is not None
        staging.release()
        tensors["wide"].add_(1)

        writer.wait_for_parts(-(-layout.size_bytes // PART_BYTES), UPLOADS[1])
        assert staged.error is None
        for upload in UPLOADS:
            assert_is_file_of(writer.file(upload), expected)


def test_the_step_after_release_changes_nothing_of_what_is_saved(build: Build, device: torch.device) -> None:
    parameter = torch.randn(50, 50, device=device)
    tensors = {"model/w": parameter}
    layout = layout_of(tensors)
    staging, writer = build(layout, device)
    parameter.mul_(3)
    expected = {"model/w": parameter.clone()}

    staging.begin(tensors, layout, UPLOADS)
    staging.release()
    parameter.mul_(5)

    writer.wait_for_parts(-(-layout.size_bytes // PART_BYTES))
    assert_is_file_of(writer.file(), expected)


def test_release_without_a_save_does_nothing(build: Build) -> None:
    staging, writer = build(layout_of(state()))

    staging.release()

    assert writer.files == {}


def test_a_save_waits_for_its_slab_until_every_upload_took_every_part(build: Build) -> None:
    tensors = {"w": torch.arange(2000.0)}
    layout = layout_of(tensors)
    staging, writer = build(layout, takes=False)
    first, second = staging.begin(tensors, layout, UPLOADS), staging.begin(tensors, layout, (9,))
    assert first is not None
    assert second is not None
    for upload in (*UPLOADS, 9):
        writer.wait_for_parts(2, upload)

    assert staging.begin(tensors, layout, (10,)) is None
    for upload, offset in ((3, 0), (8, 0), (8, 4096)):
        writer.taken(upload, offset)
    assert not first.is_free
    writer.taken(3, 4096)

    assert staging.wait_for_slab(WAIT_SECONDS)
    assert first.is_free
    assert not second.is_free
    assert staging.begin(tensors, layout, (10,)) is not None


def test_an_upload_that_ended_holds_no_slab(build: Build) -> None:
    tensors = {"w": torch.arange(2000.0)}
    layout = layout_of(tensors)
    staging, writer = build(layout, budget_bytes=3 * PART_BYTES, takes=False)
    staged = staging.begin(tensors, layout, UPLOADS)
    assert staged is not None

    for upload in UPLOADS:
        writer.ended(upload)

    assert staging.wait_for_slab(WAIT_SECONDS)
    assert staged.is_free
    assert staged.error is None


def test_when_memory_is_short_release_waits_for_the_writer(build: Build) -> None:
    tensors = {"w": torch.arange(4000.0)}
    layout = layout_of(tensors)
    staging, writer = build(layout, budget_bytes=2 * PART_BYTES, takes=False)
    staging.begin(tensors, layout, (1,))
    with ThreadPoolExecutor(1) as pool:
        released = pool.submit(staging.release)
        for number in range(2):
            writer.wait_for_parts(number + 2, 1)
            assert not released.done()
            writer.taken(1, number * PART_BYTES)
        released.result(WAIT_SECONDS)
    tensors["w"].zero_()

    writer.wait_for_parts(4, 1)
    assert_is_file_of(writer.file(1), {"w": torch.arange(4000.0)})


def stop_by_cancel(staging: Staging, writer: FakeWriter, cancel: Callable[[], None]) -> None:
    cancel()


def stop_by_failed_upload(staging: Staging, writer: FakeWriter, cancel: Callable[[], None]) -> None:
    writer.ended(1)


def stop_by_closing(staging: Staging, writer: FakeWriter, cancel: Callable[[], None]) -> None:
    assert staging.close(WAIT_SECONDS)


@pytest.mark.parametrize("stop", [stop_by_cancel, stop_by_failed_upload, stop_by_closing])
def test_a_stopped_writer_holds_nobody(
    build: Build, stop: Callable[[Staging, FakeWriter, Callable[[], None]], None]
) -> None:
    tensors = {"w": torch.arange(4000.0)}
    layout = layout_of(tensors)
    staging, writer = build(layout, budget_bytes=PART_BYTES, takes=False)
    staged = staging.begin(tensors, layout, (1,))
    assert staged is not None
    with ThreadPoolExecutor(1) as pool:
        released = pool.submit(staging.release)
        writer.wait_for_parts(1, 1)
        assert not released.done()
        stop(staging, writer, staged.cancel)
        released.result(WAIT_SECONDS)

    assert staging.wait_for_slab(WAIT_SECONDS)
    assert len(writer.files[1]) == 1
    assert staged.error is None


def test_a_silent_writer_costs_the_save_and_not_the_run(build: Build) -> None:
    tensors = {"w": torch.arange(4000.0)}
    layout = layout_of(tensors)
    staging, _ = build(layout, budget_bytes=PART_BYTES, takes=False, patience_seconds=0.01)
    staged = staging.begin(tensors, layout, (1,))
    assert staged is not None

    staging.release()

    assert staging.wait_for_slab(WAIT_SECONDS)
    assert isinstance(staged.error, StorageError)
    assert "training.checkpoint.hostMemoryBytes" in str(staged.error)


def test_a_tensor_that_is_not_as_laid_out_is_an_error_of_release(build: Build) -> None:
    layout = layout_of({"w": torch.ones(4, 3)})
    staging, writer = build(layout)

    for wrong in (torch.ones(3), torch.ones(4, 3, dtype=torch.bfloat16)):
        staged = staging.begin({"w": wrong}, layout, UPLOADS)
        assert staged is not None
        with pytest.raises(ValueError, match="w is torch"):
            staging.release()
        assert staged.is_copied or staging.wait_for_slab(WAIT_SECONDS)

    assert writer.files == {}
    staging.begin({"w": torch.ones(4, 3)}, layout, UPLOADS)
    staging.release()
    writer.wait_for_parts(1)


def test_a_writer_that_raises_is_an_error_of_the_save(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = state()
    layout = layout_of(tensors)
    staging, writer = build(layout)

    def refuse(*_: int) -> None:
        raise StorageError("the writer is gone")

    monkeypatch.setattr(writer, "part", refuse)
    staged = [staging.begin(tensors, layout, UPLOADS) for _ in range(2)]
    staging.release()

    assert staging.wait_for_slab(WAIT_SECONDS)
    assert staged[0] is not None
    assert str(staged[0].error) == "the writer is gone"


def test_nothing_is_left_behind(build: Build) -> None:
    before = threading.active_count()
    tensors = {"w": torch.arange(4000.0)}
    layout = layout_of(tensors)
    staging, writer = build(layout)
    copied = tensors["w"].clone()
    is_alive = weakref.ref(copied)

    staging.begin({"w": copied}, layout, UPLOADS)
    staging.release()
    del copied
    writer.wait_for_parts(4)
    assert staging.close(WAIT_SECONDS)
    gc.collect()

    assert is_alive() is None
    assert threading.active_count() == before


@pytest.mark.gpu
def test_a_save_never_waits_for_the_device(build: Build, waiting_is_an_error: AbstractContextManager[None]) -> None:
    # Some 22 parts: a stream that cannot go on takes about a hundred copies and events, then whoever issues more waits.
    tensors = {f"w{number}": torch.ones(60, 60, device="cuda") for number in range(5)}
    tensors["transposed"] = tensors["w0"].T
    layout = layout_of(tensors)
    staging, writer = build(layout, "cuda")
    busy_cycles = 2 * 10**9  # about a second of the device
    parts = -(-layout.size_bytes // PART_BYTES)
    staging.begin(tensors, layout, (1,))  # loads the kernels, which may wait
    staging.release()
    writer.wait_for_parts(parts, 1)

    with waiting_is_an_error:
        torch.cuda._sleep(busy_cycles)
        staged = staging.begin(tensors, layout, UPLOADS)
        staging.release()
        for number in range(5):
            tensors[f"w{number}"].zero_()
        step = torch.cuda.current_stream().record_event()

    assert not step.query(), "release() or begin() waited for the device"
    assert staged is not None
    assert not staged.is_copied
    writer.wait_for_parts(parts)
    assert staged.error is None
    loaded = safetensors.torch.load(writer.file())
    assert all(torch.equal(tensor, torch.ones(60, 60)) for tensor in loaded.values())


@pytest.mark.gpu
def test_slabs_are_page_locked_and_a_refusal_harms_nothing() -> None:
    arena = Arena(1 << 20, pin=True)

    assert arena.is_pinned
    assert arena.bytes.is_pinned()
    assert not page_lock(arena.bytes), "locked twice"
    assert torch.ones(3, device="cuda").sum().item() == 3
    arena.close()


def test_an_upload_that_failed_before_the_copy_began_keeps_no_slab(tmp_path: Path) -> None:
    """A disk that refuses the file answers faster than a large state is handed over."""
    tensors = state()
    layout = layout_of(tensors)
    slabs = Slabs.open(layout.size_bytes, layout.size_bytes + PART_BYTES, PART_BYTES, torch.device("cpu"))
    (tmp_path / "file").touch()
    writer = WriterHandle.in_thread(slabs.arena)
    staging = Staging(torch.device("cpu"), slabs, writer)
    try:
        writer.begin(1, str(tmp_path / "file"), "step/rank", layout.size_bytes)
        assert writer.wait(WAIT_SECONDS)
        assert staging.begin(tensors, layout, [1]) is not None
        assert staging.wait_for_slab(WAIT_SECONDS)
    finally:
        assert staging.close(WAIT_SECONDS)
        assert writer.close(WAIT_SECONDS)
        slabs.close()
