"""How many rows, and which, each of several data sets gives to one pass."""

from __future__ import annotations

import random
from collections.abc import Sequence


def shares(sizes: Sequence[int], weights: Sequence[float] | None = None, temperature: float = 1.0) -> list[float]:
    """Return the share of each data set in a mixture.

    Args:
        sizes: rows of each.
        weights: shares up to a common factor; by default the sizes, to the power `1 / temperature`.
        temperature: 1 takes every row once; the higher, the more alike are the shares of small and large sets.
    """
    raw = list(weights) if weights is not None else [size ** (1 / temperature) for size in sizes]
    return [value / sum(raw) for value in raw]


def counts(parts: Sequence[float], total: int) -> list[int]:
    """Round shares of `total` to whole numbers whose sum is `total`: the largest remainders are rounded up."""
    exact = [part * total for part in parts]
    whole = [int(value) for value in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: (whole[i] - exact[i], i))
    for index in by_remainder[: total - sum(whole)]:
        whole[index] += 1
    return whole


def draw(size: int, count: int, rng: random.Random) -> list[int]:
    """Choose `count` of `size` rows: each as often as any other, but for a random few that come once more."""
    passes, rest = divmod(count, size)
    return [*list(range(size)) * passes, *sorted(rng.sample(range(size), rest))]
