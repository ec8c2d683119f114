"""Tensor primitives that several merge methods share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations_with_replacement
from math import isfinite
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import TensorStream

Drop = Callable[[Floats, int], None]
"""Zeroes what is not kept of a slice `[N]` that begins at a flat index."""


def weighted_sum(x: Floats, weights: Sequence[float]) -> Floats:
    """Return `sum_i weights[i] * x[i]` over the rows of `x` `[M, N]`, in order; overwrites `x`.

    Where all weights are one number, as they mostly are, what is multiplied is the sum.
    """
    common = weights[0] if len(set(weights)) == 1 else None
    for row, weight in zip(x, weights, strict=True):
        if common is None:
            np.multiply(row, np.float32(weight), out=row)
    for row in x[1:]:
        np.add(x[0], row, out=x[0])
    return x[0] if common is None else np.multiply(x[0], np.float32(common), out=x[0])


def gram(tensor: TensorStream) -> NDArray[np.float64]:
    """Return the inner products of all pairs of inputs, `[M, M]` float64, summed slice by slice."""
    total = np.zeros((tensor.num_models, tensor.num_models))
    for _, x in tensor.stacked():
        wide = x.astype(np.float64)
        for i, j in combinations_with_replacement(range(len(wide)), 2):
            total[i, j] += inner(wide[i], wide[j])
    return np.triu(total) + np.triu(total, 1).T


_INNER = 4096
"""Elements of a product that are summed by one call; BLAS would wake its threads for many more."""


def inner(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Return the inner product of two float64 vectors, on one thread."""
    whole = len(a) // _INNER * _INNER
    blocks = np.vecdot(a[:whole].reshape(-1, _INNER), b[:whole].reshape(-1, _INNER))
    return float(blocks.sum() + a[whole:] @ b[whole:])


Vote = Literal["weighted", "total", "frequency"]
"""What elects a sign: the sum of the weighted values, of the values, or of their signs."""


def votes_of(x: Floats, weights: Sequence[float], vote: Vote) -> Floats:
    """Return what is voted for the sign of each element of deltas `[M, N]`, which may be overwritten."""
    if vote == "weighted":
        return weighted_sum(x, weights)
    return np.sign(x).sum(axis=0) if vote == "frequency" else x.sum(axis=0)


def agree_on_signs(
    x: Floats,
    weights: Sequence[float],
    *,
    vote: Vote = "weighted",
    zero: float = 1.0,
    divisor: Literal["weights", "count", "none"] = "weights",
) -> Floats:
    """Elect a sign per element and add up what agrees with it, as TIES does; `x` `[M, N]` is overwritten.

    Args:
        x: unweighted deltas; what was trimmed is 0.
        weights: of the models.
        vote: see `Vote`.
        zero: sign that is elected where the vote is 0.
        divisor: of the sum: the weights that agree, the number of models that agree and are not 0, or nothing.

    Returns:
        `[N]`; 0 where no model agrees.
    """
    votes = None if vote == "weighted" else votes_of(x, weights, vote)
    for row, weight in zip(x, weights, strict=True):
        np.multiply(row, np.float32(weight), out=row)
    if votes is None:
        votes = x.sum(axis=0)
    np.add(votes, np.float32(0), out=votes)  # turns -0 into 0, whose sign is plus
    flip = np.bitwise_and(votes.view(np.uint32), _SIGN)
    if zero < 0:
        np.copyto(flip, _SIGN, where=votes == 0)
    counts: dict[float, NDArray[np.integer]] = {}
    merged = x[0]
    for i, (row, weight) in enumerate(zip(x, weights, strict=True)):
        np.bitwise_xor(row.view(np.uint32), flip, out=row.view(np.uint32))
        np.maximum(row, 0, out=row)
        if divisor != "none":
            share = weight if divisor == "weights" else 1.0
            count = counts.setdefault(share, np.zeros(len(row), np.min_scalar_type(len(x)), like=row))
            np.add(count, row != 0, out=count)
        if i:
            np.add(merged, row, out=merged)
    if divisor != "none":
        np.divide(merged, _total(counts), out=merged)
    np.bitwise_xor(merged.view(np.uint32), flip, out=merged.view(np.uint32))
    return merged


_SIGN = np.uint32(1 << 31)


def _total(counts: Mapping[float, NDArray[np.integer]]) -> Floats:
    """Return the sum of `weight * count` over the weights, and 1 where it is 0, as where no model agrees."""
    if len(counts) == 1 and 0 not in counts:
        ((weight, count),) = counts.items()
        return np.multiply(np.maximum(count, 1, out=count), np.float32(weight), dtype=np.float32)
    total = sum((np.multiply(count, np.float32(w), dtype=np.float32) for w, count in counts.items()), np.float32(0))
    return np.add(total, total == 0, dtype=np.float32)


def norm_ratios(tensor: TensorStream, drops: Sequence[Drop | None]) -> list[float]:
    """Return the L1 norm of each input of a tensor over that of what its `drop` keeps of it.

    Args:
        tensor: read once.
        drops: of each input; called with the magnitudes of each slice `[N]` and its start, zeroes what is not kept.

    Returns:
        The ratios; 1 where nothing is kept, and where `drops` holds `None`.
    """
    before, after = [0.0] * len(drops), [0.0] * len(drops)
    for start, x in tensor.stacked() if any(drops) else ():
        for i, (row, drop) in enumerate(zip(x, drops, strict=True)):
            if drop:
                np.abs(row, out=row)
                before[i] += _sum(row)
                drop(row, start)
                after[i] += _sum(row)
    most = float(np.finfo(np.float32).max)
    return [min(a / b, most) if b else 1.0 for a, b in zip(before, after, strict=True)]


def _sum(x: Floats) -> float:
    """Return the sum of a slice; numpy adds float32 in pairs, to about seven digits, unless they overflow."""
    with np.errstate(over="ignore"):
        total = float(x.sum())
    return total if isfinite(total) else float(x.sum(dtype=np.float64))


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
