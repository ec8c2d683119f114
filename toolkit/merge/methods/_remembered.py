"""Masks that one pass over a tensor makes and the next one needs again: a bit for each element."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

MOST = 1 << 28
"""Elements of all models up to which a tensor's masks are remembered, in 32 MiB; larger ones are made again."""


class Remembered:
    """The masks of one model's tensor, slice by slice.

    Args:
        elements: of all models together.
    """

    def __init__(self, elements: int) -> None:
        self._packed: dict[tuple[int, int], NDArray[np.uint8]] | None = {} if elements <= MOST else None

    def mask(self, start: int, size: int, make: Callable[[], NDArray[np.bool_]]) -> NDArray[np.bool_]:
        """Return the mask `[size]` of a slice, made only the first time."""
        if self._packed is None:
            return make()
        packed = self._packed.get((start, size))
        if packed is not None:
            return np.unpackbits(packed, count=size).view(np.bool_)
        kept = make()
        self._packed[start, size] = np.packbits(kept)
        return kept


def remembered_bytes(elements: int) -> int:
    """Return what the masks of a tensor of so many elements, of all models together, take."""
    return elements // 8 if elements <= MOST else 0
