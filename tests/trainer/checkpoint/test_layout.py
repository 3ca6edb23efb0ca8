from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from pylon_trainer.checkpoint.layout import HEADER, Layout, assign, tensor_bytes

SHAPES = [(), (0,), (1,), (7,), (3, 0, 2), (3, 5, 7), (1, 1, 1, 1)]
DTYPES = [
    *("complex64", "float64", "float32", "float16", "bfloat16", "bool"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
]


def file_of(layout: Layout) -> bytes:
    return layout.header + bytes(layout.size_bytes - len(layout.header))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_stock_library_reads_every_dtype_and_shape(dtype: str, tmp_path: Path) -> None:
    layout = Layout.of({f"model/{shape}": (dtype, shape) for shape in SHAPES})
    path = tmp_path / "rank-00000.safetensors"
    path.write_bytes(file_of(layout))

    loaded = safetensors.torch.load(path.read_bytes())
    with safetensors.safe_open(path, "pt") as file:
        opened = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)

    for tensors in (loaded, opened):
        assert {(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
            (f"model/{shape}", getattr(torch, dtype), shape) for shape in SHAPES
        }
    assert all(place.size_bytes == loaded[name].nbytes for name, place in layout.places.items())


def test_a_file_without_tensors_is_valid() -> None:
    assert safetensors.torch.load(file_of(Layout.of({}))) == {}


def test_the_order_of_the_tensors_does_not_matter_and_each_is_aligned() -> None:
    tensors = {f"t{number}": (dtype, (number % 5 + 1,)) for number, dtype in enumerate(DTYPES)}

    layout = Layout.of(tensors)

    assert layout == Layout.of(dict(reversed(tensors.items())))
    assert len(layout.header) % 64 == 0
    for dtype, place in ((tensors[name][0], place) for name, place in layout.places.items()):
        assert place.offset % tensor_bytes(dtype, ()) == 0


def test_a_layout_is_read_back_from_its_file() -> None:
    layout = Layout.of({"a": ("float32", (3, 4)), "b": ("int8", ()), "c": ("bool", (0,))})

    assert Layout.parse(file_of(layout)) == layout


def test_a_file_of_another_writer_is_read() -> None:
    tensors = {"z": torch.arange(6.0).view(2, 3), "a": torch.arange(3, dtype=torch.int8)}
    data = safetensors.torch.save(tensors)

    places = Layout.parse(data).places

    for name, place in places.items():
        content = data[place.offset : place.offset + place.size_bytes]
        assert content == tensors[name].contiguous().numpy().tobytes()


def damaged_headers() -> list[bytes]:
    header = Layout.of({"a": ("float32", (3, 4)), "b": ("int8", ())}).header
    return [
        b"",
        header[:7],
        header[:-1],
        b"\xff" * 8 + header[8:],
        header.replace(b"F32", b"F99"),
        header.replace(b"[0,48]", b"[0,47]"),
        header.replace(b"[48,49]", b"[50,51]"),
        header.replace(b'"shape"', b'"shade"'),
        header.replace(b"{", b"[", 1),
    ]


@pytest.mark.parametrize("data", damaged_headers())
def test_a_damaged_header_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="no safetensors header"):
        Layout.parse(data)


def test_what_cannot_be_saved_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"model/w: dtype complex128 cannot be saved"):
        Layout.of({"model/w": ("complex128", (1,))})
    with pytest.raises(ValueError, match="__metadata__"):
        Layout.of({"__metadata__": ("float32", (1,))})


@pytest.mark.parametrize("part_bytes", [1, 8, 64, 100, 1000, 10**6])
def test_parts_cover_every_byte_once_in_order(part_bytes: int) -> None:
    layout = Layout.of({"a": ("float32", (33,)), "b": ("int8", (5,)), "c": ("bool", (0,)), "d": ("float64", (3, 3))})

    parts = list(layout.parts(part_bytes))

    assert [part.offset for part in parts] == list(range(0, layout.size_bytes, part_bytes))
    assert sum(part.length for part in parts) == layout.size_bytes
    pieces = [piece for part in parts for piece in part.pieces]
    assert pieces[0].offset == 0
    assert all(one.offset + one.length == next_.offset for one, next_ in pairwise(pieces))
    for piece in pieces:
        start = 0 if piece.name == HEADER else layout.places[piece.name].offset
        assert piece.offset == start + piece.begin
        assert piece.length > 0


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 20])
def test_tensors_are_divided_evenly(ranks: int) -> None:
    sizes = {f"layer{number}": 1000 + number * 10 for number in range(12)} | {"embedding": 4000, "empty": 0}

    owners = assign(sizes, ranks)

    assert owners.keys() == sizes.keys()
    loads = [sum(sizes[name] for name in sizes if owners[name] == rank) for rank in range(ranks)]
    assert max(loads) <= max(4 / 3 * math.ceil(sum(sizes.values()) / ranks), max(sizes.values()))


@given(st.dictionaries(st.text(), st.integers(0, 100)), st.integers(1, 9), st.randoms())
def test_every_rank_divides_alike(sizes: dict[str, int], ranks: int, random: object) -> None:
    names = list(sizes)
    random.shuffle(names)  # type: ignore[attr-defined]

    assert assign({name: sizes[name] for name in names}, ranks) == assign(sizes, ranks)
