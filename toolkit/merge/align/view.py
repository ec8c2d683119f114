"""A model as it looks with its units permuted: nothing is copied, elements are moved as they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from toolkit.checkpoints.dtypes import Bytes, Floats
from toolkit.checkpoints.reader import Checkpoint
from toolkit.checkpoints.view import CheckpointView
from toolkit.merge.align.axes import Axis, Permutation, Symmetry

_Fetch = Callable[[int, int], NDArray[Any]]
"""Returns elements `start` to `stop` of a stored tensor, flattened."""


class PermutedCheckpoint(CheckpointView):
    """Another checkpoint with permuted axes; a slice is made of the rows that it needs, and of no others.

    Args:
        inner: the model.
        symmetry: which axes of its tensors belong to which group.
        permutations: of groups; one that is not named stays as it is.
    """

    def __init__(self, inner: Checkpoint, symmetry: Symmetry, permutations: Mapping[str, Permutation]) -> None:
        super().__init__(inner)
        self.symmetry, self.permutations = symmetry, dict(permutations)
        self._orders: dict[Axis, Permutation] = {}

    @override
    def read_raw(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        stored, info = self._stored(name), self.info(name)
        stop = info.count if stop is None else stop
        if not self._is_permuted(stored):
            return super().read_raw(name, start, stop)
        element = f"u{info.dtype.bits // 8}"
        return self._gather(
            stored, start, stop, lambda first, last: self.inner.read_raw(stored, first, last).view(element)
        ).view(np.uint8)

    @override
    def read(self, name: str, start: int, stop: int, out: Floats) -> None:
        stored = self._stored(name)
        if not self._is_permuted(stored):
            super().read(name, start, stop, out)
            return

        def fetch(first: int, last: int) -> Floats:
            values = np.empty(last - first, np.float32)
            self.inner.read(stored, first, last, values)
            return values

        out[:] = self._gather(stored, start, stop, fetch)

    @override
    def is_stored(self, name: str) -> bool:
        return not self._is_permuted(self._stored(name)) and super().is_stored(name)

    def _is_permuted(self, stored: str) -> bool:
        return any(axis and axis.group.name in self.permutations for axis in self.symmetry.axes.get(stored, ()))

    def _order(self, axis: Axis | None) -> Permutation | None:
        if axis is None or axis.group.name not in self.permutations:
            return None
        if axis not in self._orders:
            self._orders[axis] = axis.order(self.permutations[axis.group.name])
        return self._orders[axis]

    def _gather(self, stored: str, start: int, stop: int, fetch: _Fetch) -> NDArray[Any]:
        """Return elements `start` to `stop` of the permuted tensor; a vector is one row."""
        width = self.info(stored).shape[-1]
        first, last = start // width, -(-stop // width)
        axes = self.symmetry.axes[stored]
        rows, columns = self._order(axes[0] if len(axes) == 2 else None), self._order(axes[-1])
        wanted = np.arange(first, last) if rows is None else rows[first:last]
        parts = [fetch(low * width, high * width) for low, high in _runs(wanted)]
        block = (parts[0] if len(parts) == 1 else np.concatenate(parts)).reshape(-1, width)
        if columns is not None:
            block = np.take(block, columns, axis=1)
        return block.reshape(-1)[start - first * width : stop - first * width]


def _runs(rows: Permutation) -> Iterator[tuple[int, int]]:
    """Yield the stretches of neighbouring rows as `(first, last + 1)`."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    for run in np.split(rows, breaks):
        yield int(run[0]), int(run[-1]) + 1
