"""Tensor primitives that several merge methods share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from math import sqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoints.deltas import CHUNK
from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import TensorStream

_SAMPLE = 1 << 16
"""Magnitudes from which the place of a cut is guessed."""

_SAMPLED_CHUNKS = 64
"""Chunks, spread over a tensor, that the sample is taken from."""


Reader = Callable[[int], Iterator[tuple[int, Floats]]]
"""Reads a vector of any length anew each time: `read(every)` yields `(start, [N])` for each `every`-th slice of it."""


def reader(tensor: TensorStream, model: int) -> Reader:
    """Return the reader of one input of a tensor."""
    return lambda every: tensor.of_model(model, every)


def weighted_sum(x: Floats, weights: Sequence[float]) -> Floats:
    """Return `sum_i weights[i] * x[i]` over the rows of `x` `[M, N]`, in order; overwrites `x`."""
    total = np.multiply(x[0], np.float32(weights[0]), out=x[0])
    for row, weight in zip(x[1:], weights[1:], strict=True):
        np.multiply(row, np.float32(weight), out=row)
        np.add(total, row, out=total)
    return total


def gram(tensor: TensorStream) -> NDArray[np.float64]:
    """Return the inner products of all pairs of inputs, `[M, M]` float64, summed slice by slice."""
    total = np.zeros((tensor.num_models, tensor.num_models))
    for _, x in tensor.stacked():
        wide = x.astype(np.float64)
        for i, j in combinations_with_replacement(range(len(wide)), 2):
            total[i, j] += wide[i] @ wide[j]  # a product of the matrix with itself takes four times as long
    return np.triu(total) + np.triu(total, 1).T


def agree_on_signs(
    x: Floats,
    weights: Sequence[float],
    *,
    vote: Literal["weighted", "total", "frequency"] = "weighted",
    zero: float = 1.0,
    divisor: Literal["weights", "count", "none"] = "weights",
) -> Floats:
    """Elect a sign per element and add up what agrees with it, as TIES does; `x` `[M, N]` is overwritten.

    Args:
        x: unweighted deltas; what was trimmed is 0.
        weights: of the models.
        vote: by the sum of the weighted values, of the values, or of their signs.
        zero: sign that is elected where the vote is 0.
        divisor: of the sum: the weights that agree, the number of models that agree and are not 0, or nothing.

    Returns:
        `[N]`; 0 where no model agrees.
    """
    votes = np.sign(x).sum(axis=0) if vote == "frequency" else x.sum(axis=0) if vote == "total" else None
    for row, weight in zip(x, weights, strict=True):
        np.multiply(row, np.float32(weight), out=row)
    if votes is None:
        votes = x.sum(axis=0)
    # Adding 0 turns -0 into 0, whose sign is plus.
    sign = np.copysign(np.float32(1), votes + np.float32(0))
    if zero < 0:
        np.copyto(sign, np.float32(-1), where=votes == 0)
    merged, total = np.zeros_like(sign), np.zeros_like(sign)
    for row, weight in zip(x, weights, strict=True):
        agreeing = np.multiply(row, sign, out=row)
        np.maximum(agreeing, 0, out=agreeing)
        np.add(merged, agreeing, out=merged)
        if divisor != "none":
            share = np.float32(weight if divisor == "weights" else 1)
            np.add(total, np.multiply(agreeing != 0, share), out=total)
    if divisor != "none":
        np.divide(merged, total + (total == 0), out=merged)
    return np.multiply(merged, sign, out=merged)


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


def largest(read: Reader, count: int, keep: int) -> Cut:
    """Find the `keep` elements of largest magnitude among `count`; among equals the first ones.

    Exact, in memory that does not grow with the vector. A sample brackets the threshold, one pass counts what is
    above and collects what is inside; when the bracket misses, or holds too many equal values, two histogram passes
    over the bits of the magnitudes find it.
    """
    if keep >= count:
        return Cut(0, count)
    if keep <= 0:
        return Cut(1 << 31, -1)
    low, high = _bracket(read, count, keep)
    return _cut_inside(read, count, keep, low, high) or _cut_by_histogram(read, keep)


def _magnitude_bits(x: Floats) -> NDArray[np.uint32]:
    """Return the bits of `|x|`, which order as the magnitudes do."""
    return np.bitwise_and(x.view(np.uint32), np.uint32(0x7FFFFFFF))


def _bracket(read: Reader, count: int, keep: int) -> tuple[int, int]:
    """Guess from a sample two magnitudes between which the cut lies."""
    every = max(1, count // (_SAMPLED_CHUNKS * CHUNK))
    stride = max(1, count // (every * _SAMPLE))
    sample = np.concatenate([_magnitude_bits(x[::stride]) for _, x in read(every)])
    size = len(sample)
    above = keep / count * size
    # Six standard deviations; nothing where the sample is the vector itself.
    margin = 6 * sqrt(above * (1 - keep / count)) + 16 if every * stride > 1 else 0
    order = [max(0, int(size - above - margin) - 1), min(size - 1, int(size - above + margin) + 1)]
    low, high = np.partition(sample, order)[order]
    return int(low), int(high)


def _cut_inside(read: Reader, count: int, keep: int, low: int, high: int) -> Cut | None:
    """Find the cut if it lies in `low..high` and few enough elements do, else `None`."""
    above, room = 0, max(1 << 20, count // 64)
    values: list[NDArray[np.uint32]] = []
    places: list[NDArray[np.intp]] = []
    for start, x in read(1):
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


def _cut_by_histogram(read: Reader, keep: int) -> Cut:
    """Find the cut by counting the upper 16 bits of all magnitudes, then the lower 15 of one bin."""
    upper = np.zeros(1 << 16, np.int64)
    for _, x in read(1):
        upper += np.bincount(_magnitude_bits(x) >> 15, minlength=1 << 16)
    bin_, above = _bin_of(upper, keep)
    lower = np.zeros(1 << 15, np.int64)
    for _, x in read(1):
        bits = _magnitude_bits(x)
        lower += np.bincount(bits[bits >> 15 == bin_] & 0x7FFF, minlength=1 << 15)
    low, above_too = _bin_of(lower, keep - above)
    threshold, wanted = bin_ << 15 | low, keep - above - above_too
    for start, x in read(1):
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


def norm_ratio(tensor: TensorStream, model: int, drop: Callable[[Floats, int], None]) -> float:
    """Return the L1 norm of one input of a tensor over that of what `drop` keeps of it; 1 where nothing is kept.

    Args:
        tensor: read once.
        model: which input.
        drop: called with the magnitudes of each slice `[N]` and its start, zeroes what is not kept.
    """
    before = after = 0.0
    for start, x in tensor.of_model(model):
        np.abs(x, out=x)
        before += float(x.sum(dtype=np.float64))
        drop(x, start)
        after += float(x.sum(dtype=np.float64))
    return min(before / after, float(np.finfo(np.float32).max)) if after else 1.0


def cosines(products: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return norms and cosines of vectors from their inner products; a zero vector has cosine 0 with all.

    Args:
        products: `[..., M, M]`, such as `gram` gives.

    Returns:
        `[..., M]` and `[..., M, M]`.
    """
    norms = np.sqrt(np.diagonal(products, axis1=-2, axis2=-1))
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    found = products * inverse[..., :, None] * inverse[..., None, :]
    return norms, np.clip(found, -1.0, 1.0, out=found)


def order_statistics(read: Reader, ranks: Sequence[int]) -> list[float]:
    """Return the elements at `ranks` of a vector in ascending order; none of its elements is negative.

    Exact, in two passes and in memory that does not grow with the vector: one counts the upper 16 bits of all
    elements, the other the lower 15 bits of those in the bins that hold a rank.
    """
    upper = np.zeros(1 << 16, np.int64)
    for _, x in read(1):
        upper += np.bincount(_magnitude_bits(x) >> 15, minlength=1 << 16)
    upto = np.cumsum(upper)
    bins = [int(np.searchsorted(upto, rank, side="right")) for rank in ranks]
    lower = {bin_: np.zeros(1 << 15, np.int64) for bin_ in bins}
    for _, x in read(1):
        bits = _magnitude_bits(x)
        tops = bits >> 15
        for bin_, counts in lower.items():
            counts += np.bincount(bits[tops == bin_] & 0x7FFF, minlength=1 << 15)
    found: list[int] = []
    for rank, bin_ in zip(ranks, bins, strict=True):
        below = int(upto[bin_] - upper[bin_])
        found.append(bin_ << 15 | int(np.searchsorted(np.cumsum(lower[bin_]), rank - below, side="right")))
    return np.array(found, np.uint32).view(np.float32).tolist()


def merge_matrices(
    x: Floats, weights: Sequence[float], scale: float, merge: Callable[[Floats], Floats] | None
) -> Floats:
    """Merge deltas `x` `[M, *shape]` one matrix at a time; `x` is overwritten.

    A tensor of more than two dimensions is a stack of matrices over its leading ones. Vectors and scalars become
    their mean. A matrix that holds NaN or infinity becomes NaN, for LAPACK does not return from some of them.

    Args:
        x: deltas.
        weights: of the models; each delta is multiplied by its own first.
        scale: of the result.
        merge: of `[M, N, K]`, which it may overwrite, to `[N, K]`; `None` where matrices, too, become their mean.

    Returns:
        `[*shape]`.
    """
    if merge is None or x.ndim < 3:
        shares = [scale * weight / len(x) for weight in weights]
        return weighted_sum(x.reshape(len(x), -1), shares).reshape(x.shape[1:])
    for delta, weight in zip(x, weights, strict=True):
        np.multiply(delta, np.float32(weight), out=delta)
    for matrices in np.moveaxis(x.reshape(len(x), -1, *x.shape[-2:]), 1, 0):
        if not all(np.isfinite(matrix).all() for matrix in matrices):
            matrices[0].fill(np.nan)
        elif matrices.any():
            np.multiply(merge(matrices), np.float32(scale), out=matrices[0])
    return x[0]


_ROWS = 512
"""Rows of a matrix that are widened to float64 at a time."""


def thin_svd(matrix: Floats) -> tuple[Floats, Floats, Floats]:
    """Return `u` `[N, R]`, `s` `[R]`, `vt` `[R, K]` of a matrix `[N, K]` of numerical rank `R`.

    Singular vectors of singular values that are 0 but for rounding are whatever LAPACK makes of them; they are left
    out, so that no result depends on them. The eigenvectors of the smaller Gram matrix, in float64, give the others as
    exactly as float32 values have any, and need less memory than LAPACK's SVD, for which numpy widens its input.
    """
    if matrix.shape[0] < matrix.shape[1]:
        u, s, vt = thin_svd(matrix.T)
        return vt.T, s, u.T
    squares, vectors = np.linalg.eigh(_gram_of_columns(matrix))
    floor = max(squares[-1], 0.0) * (len(matrix) * np.finfo(np.float32).eps) ** 2
    rank = int(np.count_nonzero(squares > floor))
    s, v = np.sqrt(squares[::-1][:rank]), vectors[:, ::-1][:, :rank]
    u = np.empty((len(matrix), rank), np.float32)
    for start in range(0, len(matrix), _ROWS):
        np.divide(
            matrix[start : start + _ROWS].astype(np.float64) @ v, s, out=u[start : start + _ROWS], casting="same_kind"
        )
    return u, s.astype(np.float32), np.ascontiguousarray(v.T, np.float32)


def svd_bytes(rows: int, columns: int) -> int:
    """Return an upper bound of what `thin_svd` of a float32 matrix allocates, LAPACK's workspace included."""
    rank = min(rows, columns)
    # The Gram matrix, its eigenvectors, and what LAPACK's `dsyevd` works in; blocks of rows; the factors.
    return 8 * (6 * rank**2 + 64 * rank + 2 * _ROWS * rank) + 4 * rank * (rows + columns) + 4096


def _gram_of_columns(matrix: Floats) -> NDArray[np.float64]:
    """Return the inner products of all pairs of columns, float64, summed block by block."""
    total = np.zeros((matrix.shape[1], matrix.shape[1]))
    for start in range(0, len(matrix), _ROWS):
        wide = matrix[start : start + _ROWS].astype(np.float64)
        np.add(total, wide.T @ wide, out=total)
    return total
