"""What exchanges would take among more ranks: arithmetic from what they took among a few, no measurement. Pure.

A step's collectives, alone, took so long among the ranks there were: one for each channel between two ranks, two among
more, and a reduction that says whether all is finite. Each of any more takes as long as those did; every rank more is a
hop more of a ring, two of a reduction's; and bytes pass over the network once there is more than one host. It knows
neither contention nor ranks that wait for each other. Refuses exact sums, which go in other pieces.
"""

from __future__ import annotations

from consensus_recipes import Row

RANKS = (8, 64, 1024)
HOST_RANKS = 8
HOP_US, NETWORK_HOP_US = 1.9, 4.0
"""Of a ring over NVLink and over the network: what NCCL itself reckons with when it chooses between its ways
(src/graph/tuning.cc, hwLat, LL128)."""
GIGABYTES_PER_S, NETWORK_GIGABYTES_PER_S = 300.0, 50.0
"""Of a rank: between two H200 as measured, and an adapter of 400 Gb/s."""


def project(row: Row, ranks: int) -> dict[str, float]:
    """Bytes of a step and rank, milliseconds of its collectives, and their share of the step as it was measured."""
    if row["is_exact"]:
        raise ValueError("an exact sum goes in buckets, of which the row does not tell the number")
    moved_bytes = row["bytes_per_step_mean"] * _payloads(ranks) / _payloads(row["ranks"])
    gathers, gathers_now = _gathers(row, ranks), _gathers(row, row["ranks"])
    now_ms = row["communication_fraction"] * row["step_ms"]
    hops_ms = (_ring_us(ranks) - _ring_us(row["ranks"])) / 1e3
    bytes_ms = _bytes_ms(moved_bytes, ranks) - _bytes_ms(row["bytes_per_step_mean"], row["ranks"])
    communication_ms = now_ms * (gathers + 1) / (gathers_now + 1) + (gathers + 2) * hops_ms + bytes_ms
    return {
        "bytes_per_step": moved_bytes,
        "communication_ms": communication_ms,
        "of_step_now": communication_ms / row["step_ms"],
    }


def _payloads(ranks: int) -> float:
    """That a rank moves: between two ranks one, among n 2 (n - 1) / n."""
    return 2 * (ranks - 1) / ranks


def _gathers(row: Row, ranks: int) -> int:
    """Collectives of a step that are no reductions."""
    channels = len(row["channels"].split(", "))
    return channels if ranks == 2 else 2 * channels


def _ring_us(ranks: int) -> float:
    between_hosts = -(-ranks // HOST_RANKS) - 1
    return (ranks - 1 - between_hosts) * HOP_US + between_hosts * NETWORK_HOP_US


def _bytes_ms(moved_bytes: float, ranks: int) -> float:
    return moved_bytes / 1e6 / (GIGABYTES_PER_S if ranks <= HOST_RANKS else NETWORK_GIGABYTES_PER_S)
