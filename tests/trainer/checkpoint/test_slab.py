from __future__ import annotations

import gc
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pylon_trainer.checkpoint import slab
from pylon_trainer.checkpoint.slab import Arena, Plan, Slabs

PAGE = mmap.PAGESIZE
PART = 4 * PAGE
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("file_bytes", "budget_bytes", "plan"),
    [
        (10 * PAGE, 100 * PAGE, Plan(2, 10 * PAGE, is_whole=True)),
        (10 * PAGE - 5, 20 * PAGE, Plan(2, 10 * PAGE, is_whole=True)),
        (10 * PAGE, 20 * PAGE - 1, Plan(1, 10 * PAGE, is_whole=True)),
        (10 * PAGE, 10 * PAGE, Plan(1, 10 * PAGE, is_whole=True)),
        (10 * PAGE, 10 * PAGE - 1, Plan(1, 2 * PART, is_whole=False)),
        (10 * PAGE, 0, Plan(1, PART, is_whole=False)),
        (PAGE // 2, 0, Plan(1, PAGE, is_whole=True)),
    ],
)
def test_a_budget_gives_two_slabs_one_or_a_window(file_bytes: int, budget_bytes: int, plan: Plan) -> None:
    assert Plan.of(file_bytes, budget_bytes, PART) == plan


def test_a_person_is_told_of_short_memory_and_what_to_raise() -> None:
    notices = []
    for budget_bytes in (20 * PAGE, 10 * PAGE, PART):
        slabs = Slabs.open(10 * PAGE, budget_bytes, PART, CPU)
        notices.append(slabs.notices)
        slabs.close()

    assert notices[0] == []
    assert "waits until the one before is written" in notices[1][0]
    assert "makes the optimizer wait" in notices[2][0]
    assert all("training.checkpoint.hostMemoryBytes" in notice for [notice] in notices[1:])


def test_a_child_process_reads_the_same_memory() -> None:
    arena = Arena(3 * PAGE, pin=False)
    arena.bytes[PAGE : PAGE + 5] = torch.tensor(list(b"pylon"), dtype=torch.uint8)
    program = (
        "import mmap, sys; fd, size, at = map(int, sys.argv[1:]); memory = mmap.mmap(fd, size); "
        "assert memory[at:at + 5] == b'pylon'; memory[:3] = b'yes'"
    )

    subprocess.run(
        [sys.executable, "-c", program, str(arena.fd), str(arena.size_bytes), str(PAGE)],
        pass_fds=[arena.fd],
        check=True,
    )

    assert bytes(arena.buffer[:3]) == b"yes"
    arena.close()


def test_pages_are_there_before_the_first_save() -> None:
    def resident_pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    before = resident_pages()
    arena = Arena(2048 * PAGE, pin=False)
    assert resident_pages() - before > 2000
    arena.close()


def open_files() -> set[str]:
    return {file.name for file in Path("/proc/self/fd").iterdir()}


@pytest.mark.parametrize("has_memfd", [True, False])
def test_closing_leaves_no_file_and_no_mapping(has_memfd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_memfd:
        monkeypatch.delattr(os, "memfd_create")
    gc.collect()  # what other tests left
    files = open_files()
    arena = Arena(PAGE, pin=False)
    arena.bytes[0] = 7
    inode = os.fstat(arena.fd).st_ino
    assert arena.buffer[0] == 7

    arena.close()
    gc.collect()

    assert open_files() == files
    assert not [line for line in Path("/proc/self/maps").read_text().splitlines() if line.split()[4] == str(inode)]


def test_a_view_outlives_its_arena() -> None:
    arena = Arena(PAGE, pin=False)
    view = arena.bytes[:4]
    view.fill_(3)

    arena.close()

    assert view.tolist() == [3, 3, 3, 3]


def test_slabs_are_given_once_and_do_not_overlap() -> None:
    slabs = Slabs.open(3 * PAGE, 6 * PAGE, PART, CPU)
    first, second = slabs.take(), slabs.take()
    assert first is not None
    assert second is not None
    assert abs(first.offset - second.offset) >= 3 * PAGE
    assert slabs.take() is None
    assert not slabs.has_free

    slabs.give_back(first)

    assert slabs.take() == first
    slabs.close()


def test_a_file_that_outgrew_its_slab_passes_through_it_as_a_window() -> None:
    slabs = Slabs(Plan(1, 2 * PART + PAGE, is_whole=True), PART, pin=False)

    assert slabs.window_bytes(2 * PART + PAGE) == 2 * PART + PAGE
    assert slabs.window_bytes(5 * PART) == 2 * PART
    slabs.close()


def test_the_default_budget_is_a_quarter_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(slab, "_MEMORY_LIMITS", (limit, tmp_path / "absent"))
    limit.write_text("max\n")
    machine = slab.memory_limit_bytes()
    limit.write_text(f"{8 * 2**20}\n")

    assert machine == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert slab.default_budget_bytes(local_ranks=2) == 2**20
