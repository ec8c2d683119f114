"""Find the largest elements of long vectors, and order statistics: exact, in memory that does not grow with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoints.deltas import CHUNK
from toolkit.checkpoints.dtypes import Floats

_SAMPLE = (1 << 16, 1 << 20)
"""Fewest and most magnitudes of a vector from which the place of a cut is guessed."""

_SAMPLED_CHUNKS = 64
"""Chunks, spread over a vector, that the sample is taken from."""

_ROOM = 1 << 22
"""Elements that a search may set aside before it gives up for histograms."""


class Reader(Protocol):
    """Reads vectors of one length side by side, anew each time."""

    def __call__(self, every: int = 1, begin: int = 0) -> Iterator[tuple[int, Floats]]:
        """Yield `(start, [V, N])` for each `every`-th slice, from the one that starts at `begin` on."""
        ...


@dataclass(frozen=True)
class Cut:
    """Which elements of a tensor are its largest by magnitude: exactly the wanted number.

    Attributes:
        threshold: magnitude, as the bits of a float32, above which everything is kept.
        last: of the elements at the threshold, those up to this flat index are kept.
    """

    threshold: int
    last: int

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is dropped."""
        return not self.threshold

    def drop(self, x: Floats, start: int) -> None:
        """Zero what is not kept in a chunk `x` `[N]` that begins at flat index `start`."""
        if self.keeps_all:
            return
        bits = magnitude_bits(x)
        split = min(max(self.last + 1 - start, 0), len(x))
        # Multiplying by a mask takes the same time for any mask; assigning through one mispredicts branches.
        np.multiply(x[:split], bits[:split] >= self.threshold, out=x[:split])
        np.multiply(x[split:], bits[split:] > self.threshold, out=x[split:])


ALL, NONE = Cut(0, -1), Cut(1 << 31, -1)


def magnitude_bits(x: Floats, out: NDArray[np.uint32] | None = None) -> NDArray[np.uint32]:
    """Return the bits of `|x|`, which order as the magnitudes do."""
    return np.bitwise_and(x.view(np.uint32), np.uint32(0x7FFFFFFF), out=out)


def largest(read: Reader, count: int, keep: Sequence[Sequence[int]]) -> list[list[Cut]]:
    """Find the largest elements of vectors by magnitude; among equals the first ones.

    A sample brackets each threshold. One pass over all vectors counts what is above the bracket and at its two ends,
    where fine-tunes in a narrow format have many equal values, and sets aside what is between. When a bracket misses,
    or holds too much, histogram passes over the bits of the magnitudes find the cut.

    Args:
        read: the vectors.
        count: length of each.
        keep: for each vector, how many elements; one cut for each of the numbers.

    Returns:
        The cuts, in the form of `keep`.
    """
    found = [[ALL if k >= count else NONE for k in numbers] for numbers in keep]
    open_ = [(row, i, k) for row, numbers in enumerate(keep) for i, k in enumerate(numbers) if 0 < k < count]
    if not open_:
        return found
    sample, exact = _sample(read, count)
    searches = {(row, i): _Search(sample[row], exact, count, k) for row, i, k in open_}
    for start, x in read():
        for row, values in enumerate(x):
            mine = [search for (r, _), search in searches.items() if r == row]
            bits = magnitude_bits(values) if mine else None
            for search in mine:
                assert bits is not None
                search.see(start, bits)
    for row, i, k in open_:
        found[row][i] = searches[row, i].cut(read, row) or _cut_by_histogram(read, row, k)
    return found


def _sample(read: Reader, count: int) -> tuple[list[NDArray[np.uint32]], bool]:
    """Return magnitudes of each vector, sorted, and whether they are all of them."""
    size = min(max(count // 256, _SAMPLE[0]), _SAMPLE[1])
    every = max(1, count // (max(_SAMPLED_CHUNKS, size // (CHUNK // 8)) * CHUNK))
    stride = max(1, count // (every * size))
    parts = [magnitude_bits(np.ascontiguousarray(x[:, ::stride], like=x)) for _, x in read(every)]
    return [np.sort(vector) for vector in np.concatenate(parts, axis=1)], every * stride == 1


def search_bytes(count: int, vectors: int, cuts: int = 1) -> int:
    """Bound what `largest` allocates for vectors of a length, with so many cuts of each."""
    sample = 3 * 4 * min(max(count // 128, 2 * _SAMPLE[0]), 2 * _SAMPLE[1])
    return vectors * (sample + cuts * 2 * 8 * min(count, _ROOM))


class _Search:
    """The search for one cut.

    Args:
        sample: magnitudes of the vector, ascending.
        exact: whether the sample is the vector.
        count: elements of the vector.
        keep: how many are wanted, at least one and not all.
    """

    def __init__(self, sample: NDArray[np.uint32], exact: bool, count: int, keep: int) -> None:
        self.keep = keep
        size = len(sample)
        above = keep / count * size
        # Six standard deviations.
        margin = 0 if exact else 6 * sqrt(above * (1 - keep / count)) + 16
        self.low = int(sample[max(0, int(size - above - margin) - 1)])
        self.high = int(sample[min(size - 1, int(size - above + margin) + 1)])
        self.above = self.room = 0
        self.starts: list[int] = []
        self.at_high: list[int] = []
        self.at_low: list[int] = []
        self.between: list[NDArray[np.uint32]] = []
        self.places: list[NDArray[np.uint32]] = []

    def see(self, start: int, bits: NDArray[np.uint32]) -> None:
        """Count one slice of magnitudes."""
        self.starts.append(start)
        self.above += int(np.count_nonzero(bits > self.high))
        self.at_high.append(int(np.count_nonzero(bits == self.high)))
        if self.low == self.high:
            return
        self.at_low.append(int(np.count_nonzero(bits == self.low)))
        if self.high - self.low > 1 and self.room <= _ROOM:
            # What is below the bracket wraps around to large numbers.
            distance = np.subtract(bits, np.uint32(self.low + 1))
            inside = np.flatnonzero(distance < self.high - self.low - 1)
            self.room += len(inside)
            self.between.append(bits[inside])
            self.places.append(inside.astype(np.uint32))

    def cut(self, read: Reader, row: int) -> Cut | None:
        """Return the cut; `None` if it is outside of the bracket, or too much was inside."""
        wanted = self.keep - self.above
        if wanted <= 0 or self.room > _ROOM:
            return None
        if wanted <= sum(self.at_high):
            return self._tied(read, row, self.high, self.at_high, wanted)
        wanted -= sum(self.at_high)
        if wanted <= self.room:
            return self._inside(wanted)
        wanted -= self.room
        return self._tied(read, row, self.low, self.at_low, wanted) if wanted <= sum(self.at_low) else None

    def _inside(self, wanted: int) -> Cut:
        found = np.concatenate(self.between)
        threshold = int(np.partition(found, len(found) - wanted)[len(found) - wanted])
        wanted -= int(np.count_nonzero(found > threshold))
        for start, values, places in zip(self.starts, self.between, self.places, strict=True):
            ties = places[values == threshold]
            if wanted <= len(ties):
                return Cut(threshold, start + int(ties[wanted - 1]))
            wanted -= len(ties)
        raise AssertionError("elements were counted that are not there")

    def _tied(self, read: Reader, row: int, threshold: int, counts: Sequence[int], wanted: int) -> Cut:
        """Return the cut at the `wanted`-th of the elements at a threshold, whose slice is read again."""
        upto = np.cumsum(counts)
        slice_ = int(np.searchsorted(upto, wanted))
        return _cut_at(read, row, threshold, self.starts[slice_], wanted - int(upto[slice_] - counts[slice_]))


def _cut_at(read: Reader, row: int, threshold: int, begin: int, wanted: int) -> Cut:
    """Return the cut at the `wanted`-th element at a threshold, of those from `begin` on."""
    for start, x in read(1, begin):
        ties = np.flatnonzero(magnitude_bits(x[row]) == threshold)
        if wanted <= len(ties):
            return Cut(threshold, start + int(ties[wanted - 1]))
        wanted -= len(ties)
    raise AssertionError("elements were counted that are not there")


def _cut_by_histogram(read: Reader, row: int, keep: int) -> Cut:
    """Find a cut by counting the upper 16 bits of all magnitudes, then the lower 15 of one bin."""
    upper = np.zeros(1 << 16, np.int64)
    for _, x in read():
        upper += np.bincount(magnitude_bits(x[row]) >> 15, minlength=1 << 16)
    bin_, above = _bin_of(upper, keep)
    lower = np.zeros(1 << 15, np.int64)
    for _, x in read():
        bits = magnitude_bits(x[row])
        lower += np.bincount(bits[bits >> 15 == bin_] & 0x7FFF, minlength=1 << 15)
    low, above_too = _bin_of(lower, keep - above)
    return _cut_at(read, row, bin_ << 15 | low, 0, keep - above - above_too)


def _bin_of(counts: NDArray[np.int64], keep: int) -> tuple[int, int]:
    """Return the bin that holds the `keep`-th largest, and how many are in the bins above it."""
    from_top = np.cumsum(counts[::-1])
    position = int(np.searchsorted(from_top, keep))
    return len(counts) - 1 - position, int(from_top[position] - counts[::-1][position])


def order_statistics(read: Reader, ranks: Sequence[int]) -> list[float]:
    """Return the elements at `ranks` of one vector in ascending order; none of its elements is negative.

    Two passes: one counts the upper 16 bits of all elements, the other the lower 15 bits of those in the bins that
    hold a rank.
    """
    upper = np.zeros(1 << 16, np.int64)
    for _, x in read():
        upper += np.bincount(magnitude_bits(x[0]) >> 15, minlength=1 << 16)
    upto = np.cumsum(upper)
    bins = [int(np.searchsorted(upto, rank, side="right")) for rank in ranks]
    lower = {bin_: np.zeros(1 << 15, np.int64) for bin_ in bins}
    for _, x in read():
        bits = magnitude_bits(x[0])
        tops = bits >> 15
        for bin_, counts in lower.items():
            counts += np.bincount(bits[tops == bin_] & 0x7FFF, minlength=1 << 15)
    found: list[int] = []
    for rank, bin_ in zip(ranks, bins, strict=True):
        below = int(upto[bin_] - upper[bin_])
        found.append(bin_ << 15 | int(np.searchsorted(np.cumsum(lower[bin_]), rank - below, side="right")))
    return np.array(found, np.uint32).view(np.float32).tolist()
