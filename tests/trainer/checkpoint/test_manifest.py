"""Manifest and marker: what was written comes back, anything else is found out."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime

import pytest
from saved_checkpoints import PART_BYTES, file_entry, manifest

from pylon_trainer.checkpoint.manifest import DamagedCheckpoint, FileEntry, Manifest, Marker, checksum, placeholders


def test_a_manifest_comes_back_as_it_was() -> None:
    written = manifest(attempt=3, step=7)
    read = Manifest.parse(written.dump())
    assert read == written
    assert read.dump() == written.dump()
    assert read.size_bytes == sum(file.size_bytes for file in written.files.values())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "manifest.json does not parse"),
        (b"[]", "manifest.json does not parse"),
        (b'{"step": 1}', "manifest.json does not parse"),
        (b'{"format": 2, "step": 1}', "manifest.json does not parse"),
        (b"\xff\xfe", "manifest.json does not parse"),
        (b'{"format": 1, "step": 1, "attempt": 1, "files": {}}', "is of format 1; this version reads format 2"),
    ],
)
def test_what_is_no_manifest_of_this_version_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(DamagedCheckpoint, match=words):
        Manifest.parse(data)


def test_a_manifest_whose_parts_do_not_cover_a_file_is_refused() -> None:
    fields = json.loads(manifest(1, 1).dump())
    fields["files"]["rank-00000.safetensors"]["checksums"].pop()
    with pytest.raises(DamagedCheckpoint, match="does not parse"):
        Manifest.parse(json.dumps(fields).encode())


@pytest.mark.parametrize("size_bytes", [0, 1, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 5 * PART_BYTES])
def test_parts_cover_a_file_exactly_once(size_bytes: int) -> None:
    data = bytes(number % 251 for number in range(size_bytes))
    parts = list(file_entry(data).parts())
    assert b"".join(data[part.offset : part.offset + part.length] for part in parts) == data
    for part in parts:
        part.verify("file", memoryview(data)[part.offset : part.offset + part.length])
        assert 0 < part.length <= PART_BYTES


def test_a_wrong_part_is_named() -> None:
    data = bytes(3 * PART_BYTES)
    part = list(file_entry(data).parts())[1]
    with pytest.raises(DamagedCheckpoint, match="checksum of rank-0 differs in part 1, bytes 64 to 128"):
        part.verify("rank-0", b"\x01" + bytes(PART_BYTES - 1))


def test_a_file_without_bytes_has_no_parts() -> None:
    assert list(FileEntry(0, PART_BYTES, ()).parts()) == []


def test_the_tensors_of_a_tree_are_found_wherever_they_are() -> None:
    tensor = {"file": "f", "key": "model/a", "dtype": "float32", "shape": [2]}
    tree = {"model": {"a": {"__tensor__": tensor}, "b": 1}, "list": [1, 2], "c": {"__tensor__": tensor}}
    assert list(placeholders(tree)) == [tensor, tensor]


def test_a_marker_with_any_bit_flipped_or_cut_anywhere_is_refused() -> None:
    marker = Marker(checksum(b"manifest"), datetime(2026, 3, 1, 12, 30, 15, 123456, tzinfo=UTC))
    data = marker.dump()
    assert Marker.parse(data) == marker
    flipped = [bytes([*data[:at], data[at] ^ 1 << bit, *data[at + 1 :]]) for at in range(len(data)) for bit in range(8)]
    cut = [data[:length] for length in range(len(data))]
    for damaged in [*flipped, *cut, data + b" ", data + data]:
        with pytest.raises(DamagedCheckpoint):
            Marker.parse(damaged)


def test_looking_at_checkpoints_needs_no_torch() -> None:
    program = """
import importlib, sys
sys.modules["torch"] = None  # importing it fails
for module in ("manifest", "storage", "archive", "audit", "cli"):
    importlib.import_module(f"pylon_trainer.checkpoint.{module}")
"""
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": ":".join(sys.path)})
