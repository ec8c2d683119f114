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


def token_batches(lengths: Sequence[int], budget: int, *, share: int, seed: int, epoch: int) -> list[list[int]]:
    """Return batches of as many rows of like length as fit into a number of tokens, each row once.

    What is in a batch is the same in every epoch; the batches come in another order.

    Args:
        lengths: tokens of each row, none more than `budget`.
        budget: tokens of the padded rows that one process gets of a batch.
        share: processes that a batch is dealt out to.
        seed: the same seed and epoch give the same batches.
        epoch: number of the pass.
    """
    rows = list(range(len(lengths)))
    random.Random(f"{seed}").shuffle(rows)
    batches: list[list[int]] = []
    for row in sorted(rows, key=lambda row: -lengths[row]):
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and -(-(len(batches[-1]) + 1) // share) * longest <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    random.Random(f"{seed} {epoch}").shuffle(batches)
    return batches


def padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Return the share of padding among all tokens of batches of rows."""
    computed = sum(max(lengths[row] for row in batch) * len(batch) for batch in batches)
    return 1 - sum(lengths[row] for batch in batches for row in batch) / computed
