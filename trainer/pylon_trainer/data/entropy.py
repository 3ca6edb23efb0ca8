"""N-gram entropies of a text's bytes: what a model that looks back on n - 1 bytes can reach, as a mark for losses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]

LARGEST_ORDER = 3
"""256^3 counts fit in memory; the next order's do not."""


@dataclass(frozen=True, slots=True)
class Entropy:
    """One order of n-grams."""

    order: int
    """1 unigrams, 2 bigrams, 3 trigrams."""
    nats_per_byte: float
    """Entropy of a byte given the order - 1 bytes before it."""


def ngram_entropies(texts: Iterable[str], orders: int = LARGEST_ORDER) -> list[Entropy]:
    """Conditional entropies of orders 1 to `orders`, counted over all texts; n-grams do not cross texts.

    H(x_n | x_1 .. x_n-1) = H(x_1 .. x_n) - H(x_1 .. x_n-1), the latter counted over the same n-grams.
    """
    if not 1 <= orders <= LARGEST_ORDER:
        raise ValueError(f"orders must be 1 to {LARGEST_ORDER}, not {orders}")
    counts = [np.zeros(256**order, dtype=np.int64) for order in range(1, orders + 1)]
    for text in texts:
        data = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)
        for order, count in enumerate(counts, start=1):
            length = max(len(data) - order + 1, 0)
            shifted = (data[place : place + length] << 8 * (order - 1 - place) for place in range(order))
            grams = sum(shifted, start=np.zeros(length, dtype=np.int64))
            np.add.at(count, grams, 1)
    return [Entropy(order, _conditional(count)) for order, count in enumerate(counts, start=1)]


def _conditional(count: Counts) -> float:
    joint, context = count, count.reshape(-1, 256).sum(axis=1)
    return _entropy(joint) - _entropy(context)


def _entropy(count: Counts) -> float:
    total = int(count.sum())
    if total == 0:
        return 0.0
    share = count[count > 0] / total
    return float(-(share * np.log(share)).sum())
