"""In which order rows are trained, so that little of a batch is padding: rows of like length share one."""

from __future__ import annotations

import random
from collections.abc import Sequence

WINDOW = 50
"""Batches whose rows are sorted by length together; a larger window pads less and is less random."""


def batch_order(lengths: Sequence[int], size: int, *, seed: int, epoch: int, by_length: bool) -> list[int]:
    """Return the order of all rows in one epoch, each once.

    Args:
        lengths: tokens of each row.
        size: rows of a batch; those that fill none come last.
        seed: the same seed and epoch give the same order.
        epoch: number of the pass.
        by_length: put rows of like length into a batch.
    """
    rng = random.Random(f"{seed} {epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    if not by_length:
        return order
    full = len(order) - len(order) % size
    windows = [order[start : min(start + size * WINDOW, full)] for start in range(0, full, size * WINDOW)]
    sorted_rows = [row for window in windows for row in sorted(window, key=lambda row: -lengths[row])]
    batches = [sorted_rows[start : start + size] for start in range(0, full, size)]
    rng.shuffle(batches)
    return [*(row for batch in batches for row in batch), *order[full:]]


def padding_share(lengths: Sequence[int], size: int) -> float:
    """Return the share of padding among all tokens, for rows that come in this order."""
    batches = [lengths[start : start + size] for start in range(0, len(lengths), size)]
    computed = sum(max(batch) * len(batch) for batch in batches)
    return 1 - sum(lengths) / computed
