"""Checkpoints in words and figures, for a person's terminal and for programs. Pure: reads nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from pylon_trainer.checkpoint.archive import Found, Listed
from pylon_trainer.checkpoint.manifest import placeholders

BIGGEST_TENSORS = 10


def entry(listed: Listed, found: Found | None, is_damaged: bool) -> dict[str, Any]:
    """A checkpoint's line in a listing; what is not known of an unfinished or damaged one is None."""
    state = "damaged" if is_damaged else "committed" if listed.is_committed else "unfinished"
    return {
        "step": listed.place.step,
        "attempt": listed.place.attempt,
        "committed_time": found and _iso(found.report.committed_time),
        "size_bytes": found and found.manifest.size_bytes,
        "ranks": found and found.manifest.ranks,
        "state": state,
        "name": listed.name,
    }


def job(path: str, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A job's line in a listing, from those of its checkpoints, newest first."""
    committed = [entry for entry in entries if entry["state"] == "committed"]
    newest = committed[0] if committed else {}
    return {
        "job": path,
        "checkpoints": len(committed),
        "step": newest.get("step"),
        "committed_time": newest.get("committed_time"),
        "size_bytes": sum(entry["size_bytes"] for entry in committed),
    }


def facts(found: Found) -> dict[str, Any]:
    """What a manifest tells."""
    manifest = found.manifest
    tensors = [
        *placeholders(manifest.replicated),
        *placeholders({str(rank): own for rank, own in enumerate(manifest.own)}),
    ]
    biggest = sorted(tensors, key=_size_bytes, reverse=True)[:BIGGEST_TENSORS]
    return {
        "uri": found.report.uri,
        "step": manifest.step,
        "attempt": manifest.attempt,
        "committed_time": _iso(found.report.committed_time),
        "ranks": manifest.ranks,
        "size_bytes": manifest.size_bytes,
        "parameters": sum(math.prod(one["shape"]) for one in placeholders(manifest.replicated.get("model"))),
        "tensors": len(tensors),
        "position": manifest.replicated.get("position"),
        "identity": manifest.replicated.get("identity"),
        "files": {
            name: {"size_bytes": file.size_bytes, "parts": len(file.checksums)} for name, file in manifest.files.items()
        },
        "biggest_tensors": [{**tensor, "size_bytes": _size_bytes(tensor)} for tensor in biggest],
    }


def table(rows: Sequence[Mapping[str, Any]], now: datetime) -> Iterator[str]:
    """Lines of aligned columns, with an age beside each time; none when there are no rows."""
    cells = [_cells(row, now) for row in rows]
    heads = list(cells[0]) if cells else []
    widths = {head: max(len(head), *(len(row[head]) for row in cells)) for head in heads}
    for row in [{head: head for head in heads}, *cells] if cells else []:
        yield "  ".join(row[head].ljust(widths[head]) for head in heads).rstrip()


def lines(described: Mapping[str, Any]) -> Iterator[str]:
    """The facts, one to a line; below a heading where there are several of a kind."""
    for name, value in described.items():
        label = name.removesuffix("_bytes").replace("_", " ")
        if name == "files":
            yield f"{label}:"
            yield from (f"  {file}  {size(one['size_bytes'])}, {one['parts']} parts" for file, one in value.items())
        elif name == "biggest_tensors":
            yield f"{label}:"
            for one in value:
                yield f"  {one['key']}  {one['dtype']}{one['shape']}  {size(one['size_bytes'])}, in {one['file']}"
        elif isinstance(value, dict):
            yield f"{label}:"
            yield from (f"  {path}: {leaf}" for path, leaf in _leaves(value))
        else:
            yield f"{label}: {size(value) if name.endswith('_bytes') else value}"


def size(size_bytes: int) -> str:
    """As 1.5 GiB."""
    value, units = float(size_bytes), iter(("B", "KiB", "MiB", "GiB"))
    for unit in units:
        if value < 1024:
            return f"{size_bytes} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _cells(row: Mapping[str, Any], now: datetime) -> dict[str, str]:
    cells = {}
    for name, value in row.items():
        if name == "size_bytes":
            cells["SIZE"] = "-" if value is None else size(value)
        else:
            cells[name.removesuffix("_time").upper()] = "-" if value is None else str(value)
        if name == "committed_time":
            cells["AGE"] = "-" if value is None else _age((now - datetime.fromisoformat(value)).total_seconds())
    return cells


def _age(seconds: float) -> str:
    """As Kubernetes prints it, with one unit."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{int(seconds // length)}{unit}"
    return f"{max(0, int(seconds))}s"


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _size_bytes(placeholder: Mapping[str, Any]) -> int:
    """By the bits that the name of its dtype tells: bfloat16, float8_e4m3fn; bool has none, and takes a byte."""
    bits = re.search(r"\d+", placeholder["dtype"])
    return int(math.prod(placeholder["shape"])) * (int(bits[0]) // 8 if bits else 1)


def _iso(time: datetime | None) -> str | None:
    return time.isoformat(timespec="seconds") if time else None
