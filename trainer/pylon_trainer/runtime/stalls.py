"""Which rank keeps all others waiting, found out once a collective has timed out.

Every rank that gives up leaves word in the rendezvous' store; those that have left none shortly after are the ones that
are stuck elsewhere. It costs nothing before: no step leaves any trace. Ranks time out together, because they began to
wait within a step of each other.
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import torch.distributed as dist

GRACE_SECONDS = 5.0
"""From the first rank that gives up to the last; also how long the store may take to answer."""
_POLL_SECONDS = 0.1


def name_silent_ranks() -> str:
    """For a person: the ranks that did not give up waiting as this one did; empty when all did.

    Takes GRACE_SECONDS when there are any. Rank 0 holds the store: when that does not answer, it is rank 0.
    """
    found = [[0]]
    search = threading.Thread(target=lambda: found.append(_silent_ranks()), daemon=True)  # a frozen store never answers
    search.start()
    search.join(2 * GRACE_SECONDS)
    return ", ".join(f"rank {rank}" for rank in found[-1])


def _silent_ranks() -> list[int]:
    store = dist.distributed_c10d._get_default_store()
    silent = [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()]
    deadline = time.monotonic() + GRACE_SECONDS
    try:
        store.set_timeout(timedelta(seconds=GRACE_SECONDS))
        store.set(_key(dist.get_rank()), "")
        while silent and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            silent = [rank for rank in silent if not store.check([_key(rank)])]
    except dist.DistError:
        return [0]
    return silent


def _key(rank: int) -> str:
    return f"pylon/gave up/{rank}"
