"""Tensor primitives that several merge methods share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoints.deltas import CHUNK
from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import TensorStream

_SAMPLE = 1 << 16
"""Magnitudes from which the place of a cut is guessed."""

_SAMPLED_CHUNKS = 64
"""Chunks, spread over a tensor, that the sample is taken from."""


def weighted_sum(x: Floats, weights: Sequence[float]) -> Floats:
    """Return `sum_i weights[i] * x[i]` over the rows of `x` `[M, N]`, in order; overwrites `x`."""
    total = np.multiply(x[0], np.float32(weights[0]), out=x[0])
    for row, weight in zip(x[1:], weights[1:], strict=True):
        np.multiply(row, np.float32(weight), out=row)
        np.add(total, row, out=total)
    return total


@dataclass(frozen=True)
class Cut:
    """Which elements of a tensor are its largest by magnitude: exactly the wanted number.

    Attributes:
        threshold: magnitude, as the bits of a float32, above which everything is kept.
        last: of the elements at the threshold, those up to this flat index are kept.
    """

    threshold: int
    last: int

    def drop(self, x: Floats, start: int) -> None:
        """Zero what is not kept in a chunk `x` `[N]` that begins at flat index `start`."""
        bits = _magnitude_bits(x)
        split = min(max(self.last + 1 - start, 0), len(x))
        # Multiplying by a mask takes the same time for any mask; assigning through one mispredicts branches.
        np.multiply(x[:split], bits[:split] >= self.threshold, out=x[:split])
        np.multiply(x[split:], bits[split:] > self.threshold, out=x[split:])


def largest(tensor: TensorStream, model: int, keep: int) -> Cut:
    """Find the `keep` elements of largest magnitude of one model's tensor; among equals the first ones.

    Exact, in memory that does not grow with the tensor. A sample brackets the threshold, one pass counts what
    is above and collects what is inside; when the bracket misses, or holds too many equal values, two histogram
    passes over the bits of the magnitudes find it.
    """
    if keep >= tensor.count:
        return Cut(0, tensor.count)
    if keep <= 0:
        return Cut(1 << 31, -1)
    low, high = _bracket(tensor, model, keep)
    return _cut_inside(tensor, model, keep, low, high) or _cut_by_histogram(tensor, model, keep)


def _magnitude_bits(x: Floats) -> NDArray[np.uint32]:
    """Return the bits of `|x|`, which order as the magnitudes do."""
    return np.bitwise_and(x.view(np.uint32), np.uint32(0x7FFFFFFF))


def _bracket(tensor: TensorStream, model: int, keep: int) -> tuple[int, int]:
    """Guess from a sample two magnitudes between which the cut lies."""
    every = max(1, tensor.count // (_SAMPLED_CHUNKS * CHUNK))
    stride = max(1, tensor.count // (every * _SAMPLE))
    sample = np.concatenate([_magnitude_bits(x[::stride]) for _, x in tensor.of_model(model, every)])
    size = len(sample)
    above = keep / tensor.count * size
    # Six standard deviations; nothing where the sample is the tensor itself.
    margin = 6 * sqrt(above * (1 - keep / tensor.count)) + 16 if every * stride > 1 else 0
    order = [max(0, int(size - above - margin) - 1), min(size - 1, int(size - above + margin) + 1)]
    low, high = np.partition(sample, order)[order]
    return int(low), int(high)


def _cut_inside(tensor: TensorStream, model: int, keep: int, low: int, high: int) -> Cut | None:
    """Find the cut if it lies in `low..high` and few enough elements do, else `None`."""
    above, room = 0, max(1 << 20, tensor.count // 64)
    values: list[NDArray[np.uint32]] = []
    places: list[NDArray[np.intp]] = []
    for start, x in tensor.of_model(model):
        bits = _magnitude_bits(x)
        above += int(np.count_nonzero(bits > high))
        inside = np.flatnonzero((bits >= low) & (bits <= high))
        room -= len(inside)
        if room < 0 or above >= keep:
            return None
        values.append(bits[inside])
        places.append(inside + start)
    found, where = np.concatenate(values), np.concatenate(places)
    wanted = keep - above
    if wanted > len(found):
        return None
    threshold = np.partition(found, len(found) - wanted)[len(found) - wanted]
    ties = where[found == threshold]
    return Cut(int(threshold), int(ties[wanted - np.count_nonzero(found > threshold) - 1]))


def _cut_by_histogram(tensor: TensorStream, model: int, keep: int) -> Cut:
    """Find the cut by counting the upper 16 bits of all magnitudes, then the lower 15 of one bin."""
    upper = np.zeros(1 << 16, np.int64)
    for _, x in tensor.of_model(model):
        upper += np.bincount(_magnitude_bits(x) >> 15, minlength=1 << 16)
    bin_, above = _bin_of(upper, keep)
    lower = np.zeros(1 << 15, np.int64)
    for _, x in tensor.of_model(model):
        bits = _magnitude_bits(x)
        lower += np.bincount(bits[bits >> 15 == bin_] & 0x7FFF, minlength=1 << 15)
    low, above_too = _bin_of(lower, keep - above)
    threshold, wanted = bin_ << 15 | low, keep - above - above_too
    for start, x in tensor.of_model(model):
        ties = np.flatnonzero(_magnitude_bits(x) == threshold)
        if wanted <= len(ties):
            return Cut(threshold, start + int(ties[wanted - 1]))
        wanted -= len(ties)
    raise AssertionError("the histogram counted elements that are not there")


def _bin_of(counts: NDArray[np.int64], keep: int) -> tuple[int, int]:
    """Return the bin that holds the `keep`-th largest, and how many are in the bins above it."""
    from_top = np.cumsum(counts[::-1])
    position = int(np.searchsorted(from_top, keep))
    return len(counts) - 1 - position, int(from_top[position] - counts[::-1][position])
