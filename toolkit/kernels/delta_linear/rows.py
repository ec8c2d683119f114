"""Which rows of a batch belong together."""

from __future__ import annotations

from collections.abc import Sequence


def rows_by_task(tasks: Sequence[int]) -> dict[int, list[int]]:
    """Return the rows of every fine-tune that has some, in order; -1 is none."""
    found: dict[int, list[int]] = {}
    for row, task in enumerate(tasks):
        if task >= 0:
            found.setdefault(task, []).append(row)
    return found
