"""`pylon checkpoints`: what it prints, what it removes, and its one line for each mistake."""

from __future__ import annotations

import json
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from saved_checkpoints import Run, manifest, places, write_files

from pylon_trainer.checkpoint.cli import checkpoints
from pylon_trainer.checkpoint.storage import Storage

IDENTITY = {"model": {"layers": 2}, "tokenizer": "bytes"}
MODEL = {
    name: {"__tensor__": {"file": "rank-00000.safetensors", "key": f"model/{name}", "dtype": dtype, "shape": shape}}
    for name, dtype, shape in (("embed", "bfloat16", [16, 8]), ("norm", "float32", [8]), ("mask", "bool", [3]))
}


def pylon_checkpoints(*arguments: str, answer: str = "") -> Result:
    return CliRunner().invoke(checkpoints, arguments, input=answer)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two jobs: one with checkpoints of two attempts and an unfinished save, one that has just begun."""
    storage = Storage(str(tmp_path / "default" / "demo-12345678"))
    first = Run(storage, attempt=1, keep=9).begin()
    first.save(10)
    write_files(storage, first.archive.new_name(20), 1, 20)
    second = Run(storage, attempt=2, keep=9).begin().archive
    name = second.new_name(15)
    write_files(storage, name, 2, 15)
    second.commit(name, manifest(2, 15, {"model": MODEL, "position": {"step": 15}, "identity": IDENTITY}))
    Run(Storage(str(tmp_path / "default" / "new-00000000"))).begin()
    (tmp_path / "README").write_text("a file beside the jobs")
    return tmp_path


@pytest.fixture
def job(root: Path) -> Path:
    return root / "default" / "demo-12345678"


def only(job: Path, step: int) -> Path:
    (path,) = job.glob(f"step-{step:012d}-*")
    return path


def damage(job: Path, step: int) -> None:
    path = only(job, step) / "rank-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[70] ^= 4
    path.write_bytes(data)


def test_ls_prints_a_line_for_each_newest_first(job: Path) -> None:
    lines = pylon_checkpoints("ls", str(job)).output.splitlines()
    assert lines[0].split() == ["STEP", "ATTEMPT", "COMMITTED", "AGE", "SIZE", "RANKS", "STATE", "NAME"]
    rows = [line.split() for line in lines[1:]]
    assert [(row[0], row[1], row[-2], row[-1]) for row in rows] == [
        ("15", "2", "committed", only(job, 15).name),
        ("20", "1", "unfinished", only(job, 20).name),
        ("10", "1", "committed", only(job, 10).name),
    ]
    assert rows[0][4:7] == ["275", "B", "2"]
    assert rows[0][3].endswith("s")


def test_ls_for_programs(job: Path) -> None:
    newest, unfinished, oldest = json.loads(pylon_checkpoints("ls", str(job), "--output", "json").output)
    assert (newest["step"], newest["attempt"], newest["size_bytes"], newest["ranks"]) == (15, 2, 275, 2)
    assert newest["committed_time"].endswith("+00:00")
    assert (unfinished["state"], unfinished["size_bytes"], unfinished["committed_time"]) == ("unfinished", None, None)
    assert oldest["state"] == "committed"


def test_ls_of_a_root_lists_its_jobs(root: Path) -> None:
    lines = pylon_checkpoints("ls", str(root)).output.splitlines()
    assert lines[0].split() == ["JOB", "CHECKPOINTS", "STEP", "COMMITTED", "AGE", "SIZE"]
    assert lines[1].split()[:3] == ["default/demo-12345678", "2", "15"]
    assert lines[2].split()[:3] == ["default/new-00000000", "0", "-"]


def test_ls_of_a_single_one_and_of_a_job_that_has_none_yet(root: Path, job: Path) -> None:
    assert len(pylon_checkpoints("ls", str(only(job, 10))).output.splitlines()) == 2
    new = pylon_checkpoints("ls", str(root / "default" / "new-00000000"))
    assert (new.exit_code, new.output) == (0, "")


def test_ls_finds_damage_only_when_it_reads(job: Path) -> None:
    damage(job, 10)
    (only(job, 15) / "manifest.json").write_bytes(b"{}")

    def states(*options: str) -> list[str]:
        return [row["state"] for row in json.loads(pylon_checkpoints("ls", str(job), *options).stdout)]

    assert states("--output", "json") == ["damaged", "unfinished", "committed"]
    assert states("--output", "json", "--verify") == ["damaged", "unfinished", "damaged"]


def test_verify_reads_everything(job: Path) -> None:
    result = pylon_checkpoints("verify", str(job))
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [f"{only(job, step).name}: whole" for step in (15, 10)]


def test_verify_names_the_file_and_the_part_that_is_damaged(job: Path) -> None:
    damage(job, 10)
    result = pylon_checkpoints("verify", str(job))
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        f"{only(job, 15).name}: whole",
        f"{only(job, 10).name}: checksum of rank-00001.safetensors differs in part 1, bytes 64 to 128",
    ]
    assert pylon_checkpoints("verify", str(only(job, 15))).exit_code == 0
    assert pylon_checkpoints("verify", str(only(job, 10)) + "/").exit_code == 1


def test_show_describes_the_newest(job: Path) -> None:
    lines = pylon_checkpoints("show", str(job)).output.splitlines()
    assert f"uri: {only(job, 15)}" in lines
    assert "parameters: 139" in lines
    assert "size: 275 B" in lines
    assert "  rank-00001.safetensors  138 B, 3 parts" in lines
    assert "  model.layers: 2" in lines
    start = lines.index("biggest tensors:")
    assert lines[start + 1] == "  model/embed  bfloat16[16, 8]  256 B, in rank-00000.safetensors"
    assert lines[start + 3] == "  model/mask  bool[3]  3 B, in rank-00000.safetensors"


def test_show_for_programs_and_of_a_single_one(job: Path) -> None:
    facts = json.loads(pylon_checkpoints("show", str(job), "--output", "json").output)
    assert facts["identity"] == IDENTITY
    assert facts["position"] == {"step": 15}
    assert facts["files"]["rank-00000.safetensors"] == {"size_bytes": 137, "parts": 3}
    assert "step: 10" in pylon_checkpoints("show", str(only(job, 10))).output.splitlines()


def test_prune_asks_first(job: Path) -> None:
    refused = pylon_checkpoints("prune", str(job), "--keep", "1", answer="n\n")
    assert refused.exit_code == 1
    assert f"{only(job, 10).name}: committed" in refused.output
    assert f"{only(job, 20).name}: unfinished" in refused.output
    storage = Storage(str(job))
    assert places(storage) == [(1, 10), (1, 20), (2, 15)]
    assert pylon_checkpoints("prune", str(job), "--keep", "1", answer="y\n").exit_code == 0
    assert places(storage) == [(2, 15)]
    again = pylon_checkpoints("prune", str(job), "--keep", "1", "--yes")
    assert (again.exit_code, again.output) == (0, "nothing to remove\n")


def test_prune_keeps_as_many_as_asked_and_what_is_newer_than_all_of_them(job: Path) -> None:
    storage = Storage(str(job))
    write_files(storage, Run(storage, attempt=2).archive.new_name(30), 2, 30)
    assert pylon_checkpoints("prune", str(job), "--keep", "2", "--yes").exit_code == 0
    assert places(storage) == [(1, 10), (2, 15), (2, 30)]


def test_prune_never_counts_a_damaged_one_as_kept(job: Path) -> None:
    (only(job, 15) / "manifest.json").write_bytes(b"{}")
    assert pylon_checkpoints("prune", str(job), "--keep", "1", "--yes").exit_code == 0
    assert (1, 10) in places(Storage(str(job)))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["ls", "{root}/nowhere"], "{root}/nowhere holds no checkpoints, nor do the directories of jobs below it"),
        (
            ["show", "{root}"],
            "{root} holds several jobs; give one of them: default/demo-12345678, default/new-00000000",
        ),
        (["verify", "{root}/default/new-00000000"], "{root}/default/new-00000000 has no committed checkpoint"),
        (["ls", "s4://bucket/x"], "s4://bucket/x: unknown scheme s4://"),
        (["show", "{unfinished}"], "{unfinished} is no committed checkpoint"),
        (["prune", "{unfinished}", "--keep", "1"], "{unfinished} is a single checkpoint; give its job's directory"),
    ],
)
def test_a_mistake_is_one_line(root: Path, job: Path, arguments: list[str], line: str) -> None:
    words = {"root": str(root), "unfinished": str(only(job, 20))}
    result = pylon_checkpoints(*(argument.format(**words) for argument in arguments))
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {line.format(**words)}")
    assert len(result.output.splitlines()) == 1


def test_show_of_a_damaged_one_says_what_is_wrong(job: Path) -> None:
    (only(job, 15) / "manifest.json").write_bytes(b"{}")
    result = pylon_checkpoints("show", str(job))
    assert result.exit_code == 1
    assert result.output == f"Error: {only(job, 15)}: checksum of manifest.json differs\n"


def test_pylon_knows_the_command() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    value = project["entry-points"]["pylon.commands"]["checkpoints"]
    assert EntryPoint("checkpoints", value, "pylon.commands").load() is checkpoints
