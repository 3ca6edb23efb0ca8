"""What exchanges would take among more ranks: arithmetic from what they took among a few, no measurement. Pure.

A step's collectives, alone, took so long among the ranks there were. With more ranks a channel takes two where between
two ranks it took one, each as long as those did; every rank more is a hop more of a ring; and the bytes pass over the
network once there is more than one host. It knows neither contention nor ranks that wait for each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]

RANKS = (8, 64, 1024)
HOST_RANKS = 8
HOP_US, NETWORK_HOP_US = 1.9, 4.0
"""Of a ring over NVLink and over the network: what NCCL itself reckons with when it chooses between its ways
(src/graph/tuning.cc, hwLat, LL128)."""
GIGABYTES_PER_S, NETWORK_GIGABYTES_PER_S = 300.0, 50.0
"""Of a rank: between two H200 as measured, and an adapter of 400 Gb/s."""


def project(row: Row, ranks: int) -> dict[str, Any]:
    """Bytes of a step and rank, milliseconds of its collectives, and their share of the step as it was measured."""
    moved_bytes = row["bytes_per_step_mean"] * _payloads(ranks) / _payloads(row["ranks"])
    calls, calls_now = _calls(row, ranks), _calls(row, row["ranks"])
    now_ms = row["communication_fraction"] * row["step_ms"]
    hops_ms = (_ring_us(ranks) - _ring_us(row["ranks"])) / 1e3
    bytes_ms = _bytes_ms(moved_bytes, ranks) - _bytes_ms(row["bytes_per_step_mean"], row["ranks"])
    communication_ms = now_ms * calls / calls_now + calls * hops_ms + bytes_ms
    return {
        "ranks": ranks,
        "bytes_per_step": moved_bytes,
        "communication_ms": communication_ms,
        "of_step_now": communication_ms / row["step_ms"],
    }


def _payloads(ranks: int) -> float:
    """That a rank moves: between two ranks one, among n 2 (n - 1) / n."""
    return 2 * (ranks - 1) / ranks


def _calls(row: Row, ranks: int) -> int:
    """Collectives of a step: of each channel, and one for the word whether all is finite."""
    channels = len(row["channels"].split(", "))
    return 1 + channels * (1 if ranks == 2 or row["is_exact"] else 2)


def _ring_us(ranks: int) -> float:
    between_hosts = -(-ranks // HOST_RANKS) - 1
    return (ranks - 1 - between_hosts) * HOP_US + between_hosts * NETWORK_HOP_US


def _bytes_ms(moved_bytes: float, ranks: int) -> float:
    return moved_bytes / 1e6 / (GIGABYTES_PER_S if ranks <= HOST_RANKS else NETWORK_GIGABYTES_PER_S)
