"""Singular values of one matrix, and how many of several matrices' to keep.

A matrix of at most a million elements is decomposed in float64, a larger one in float32. Where few of many singular
values are wanted, they are found by subspace iteration from a random start (Halko, Martinsson and Tropp, "Finding
Structure with Randomness", 2011, arXiv:0909.4061), which stops when another pass no longer lessens the error, and gives
way to the full decomposition when it does not settle. Its error is within about a thousandth of the best.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoints.dtypes import Floats

SMALL = 1 << 20
"""Elements up to which a matrix is decomposed in float64."""

_SHARE = 6
"""Subspace iteration pays where the wanted rank is less than this part of the matrix's."""

_EXTRA = 16
"""Directions that are iterated beside the wanted ones, so that these settle fast."""

_PASSES = 12
_SETTLED = 1e-3
"""Relative change of the squared error at which the iteration has settled."""

Key = TypeVar("Key", bound=Hashable)
Truncated = tuple[NDArray[Any], NDArray[Any], NDArray[Any], float]


def leading(matrix: Floats, rank: int) -> Truncated:
    """Return the `r` largest singular values of `[M, N]` and their vectors, `r` at most `rank`.

    Returns:
        `u` `[M, r]`, `s` `[r]`, `vt` `[r, N]`, and the Frobenius norm of what they leave out.
    """
    if matrix.size > SMALL and _SHARE * (rank + _EXTRA) <= min(matrix.shape):
        found = _iterated(matrix, rank)
        if found is not None:
            return found
    u, s, vt = np.linalg.svd(_widened(matrix), full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank], float(np.linalg.norm(s[rank:]))


def singular_values(matrix: Floats) -> NDArray[np.float64]:
    """Return all singular values of `[M, N]`, the largest first."""
    return np.linalg.svd(_widened(matrix), compute_uv=False).astype(np.float64)


def rank_for_energy(values: NDArray[np.float64], share: float) -> int:
    """Return the smallest rank that keeps a share of the squared Frobenius norm; at `share` 1 all that is not zero."""
    kept = np.cumsum(np.square(values))
    if not kept.size or not kept[-1]:
        return 0
    return min(int(np.searchsorted(kept, share * kept[-1])) + 1, len(values))


def ranks_for_budget(
    values: Mapping[Key, NDArray[np.float64]], costs: Mapping[Key, int], budget: int
) -> dict[Key, int]:
    """Spread bytes over matrices so that the total squared error is least: by squared singular value per byte.

    Args:
        values: of each matrix, the largest first.
        costs: bytes of one rank of each matrix.
        budget: bytes in all.

    Returns:
        The rank of each matrix; no other ranks that take as many bytes or fewer leave a smaller error, but for the
        last bytes, which no singular value may fit.
    """
    ranks = dict.fromkeys(values, 0)
    gains = [(-(float(s) ** 2) / costs[key], i, key) for key, found in values.items() for i, s in enumerate(found) if s]
    # A matrix's values fall, so sorting never puts a later one first; the index keeps equal ones in order.
    for _, _, key in sorted(gains, key=lambda gain: gain[:2]):
        if costs[key] <= budget:
            ranks[key] += 1
            budget -= costs[key]
    return ranks


def _widened(matrix: Floats) -> NDArray[Any]:
    return matrix.astype(np.float64) if matrix.size <= SMALL else matrix


def _iterated(matrix: Floats, rank: int) -> Truncated | None:
    """Find leading singular vectors by subspace iteration; `None` if it does not settle."""
    total = sum(float(np.square(row, dtype=np.float64).sum()) for row in matrix)
    start = np.random.default_rng(0).standard_normal((matrix.shape[1], rank + _EXTRA), np.float32)
    q, _ = np.linalg.qr(matrix @ start)
    last = np.inf
    for _ in range(_PASSES):
        z, _ = np.linalg.qr(matrix.T @ q)
        q, r = np.linalg.qr(matrix @ z)
        u, s, vt = np.linalg.svd(r.astype(np.float64))
        rest = max(total - float(np.square(s[:rank]).sum()), 0.0)
        # Below this the squared error is the rounding of float32.
        if last - rest <= max(_SETTLED * rest, 1e-6 * total):
            return q @ u[:, :rank].astype(np.float32), s[:rank], vt[:rank].astype(np.float32) @ z.T, rest**0.5
        last = rest
    return None
