"""Spherical interpolation of two models, or of their deltas where there is a base, by their weights.

As `slerp` with `t = w_2 / (w_1 + w_2)`, over the whole tensor or over each of its vectors along one dimension:
`sin((1-t) Omega) / sin(Omega) * v_1 + sin(t Omega) / sin(Omega) * v_2` for the angle `Omega` between the two.
Vectors on one line, and zero ones, which have no direction, are interpolated along the straight line.

Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985; parameters as in mergekit.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import MethodParams, TensorStream
from toolkit.merge.ops import gram

TAKES = "either"
MODELS = (2, 2)
USES_ALL = True
SCOPE = "row"

COLLINEAR = 1e-4
"""Sine up to which two vectors are on one line.

The arc between nearly parallel ones is the straight line to float32; that between nearly opposite ones is a
direction made of rounding errors.
"""


class Params(MethodParams):
    """Parameters of `nuslerp`.

    Attributes:
        weight: of each model; only their ratio matters, and weights that sum to 0 count as equal.
        nuslerp_flatten: interpolate the whole tensor as one vector.
        nuslerp_row_wise: otherwise, the vectors along the first dimension (columns of a matrix) instead of those
            along the last (its rows), whatever mergekit's name for it says.
    """

    weight: tuple[float, ...]
    nuslerp_flatten: bool = True
    nuslerp_row_wise: bool = False


def prepare(tensor: TensorStream, params: Params) -> Floats | None:
    """Return the factors of the two models, `[2, C]` for `C` columns, or `None` where `combine` finds those of rows.

    A flattened tensor is one column. For several columns memory is five numbers each.
    """
    if params.nuslerp_flatten:
        products = gram(tensor)
        sums = np.array([[products[0, 1]], [products[0, 0]], [products[1, 1]]])
    elif params.nuslerp_row_wise:
        sums = _column_sums(tensor)
    else:
        return None
    return _factors(sums, params.weight)


def combine(x: Floats, params: Params, state: Floats | None, start: int) -> Floats:
    """Interpolate some rows `[2, R, K]`."""
    if state is None:
        factors = _factors(_sums(x, "rk,rk->r"), params.weight)
        np.multiply(x, factors[:, :, None], out=x)
    else:
        for block, columns in _by_columns(x.reshape(2, -1), start, state.shape[1]):
            np.multiply(block, state[:, None, columns], out=block)
    return np.add(x[0], x[1], out=x[0])


def coefficients(params: Params, state: Floats | None) -> list[float] | None:
    """Return the factors of the two deltas, where they are those of the whole tensor."""
    return state[:, 0].tolist() if params.nuslerp_flatten and state is not None else None


def _factors(sums: NDArray[np.float64], weight: tuple[float, ...]) -> Floats:
    """Return the factors `[2, ...]` from the inner products `a.b`, `a.a` and `b.b`, `[3, ...]`."""
    dot, square_a, square_b = sums
    norms = np.sqrt(square_a) * np.sqrt(square_b)
    cosine = np.divide(dot, norms, out=np.ones_like(dot), where=norms > 0)
    np.clip(cosine, -1.0, 1.0, out=cosine)
    sine = np.sqrt(1 - np.square(cosine))
    straight = sine <= COLLINEAR
    angle = np.arccos(cosine)
    np.copyto(sine, 1.0, where=straight)
    t = _share(weight)
    return np.stack([np.where(straight, part, np.sin(part * angle) / sine) for part in (1 - t, t)]).astype(np.float32)


def _share(weight: tuple[float, ...]) -> float:
    """Return `t`, the second model's share of the weights."""
    first, second = weight
    total = first + second
    return second / total if abs(total) > 1e-6 * (abs(first) + abs(second)) else 0.5


def _sums(x: Floats, subscripts: str) -> NDArray[np.float64]:
    """Return `a.b`, `a.a` and `b.b` over one dimension of `x` `[2, R, K]`, in float64."""
    a, b = x.astype(np.float64)
    return np.stack([np.einsum(subscripts, u, v) for u, v in ((a, b), (a, a), (b, b))])


def _column_sums(tensor: TensorStream) -> NDArray[np.float64]:
    sums = np.zeros((3, prod(tensor.shape[1:])))
    for start, x in tensor.stacked():
        for block, columns in _by_columns(x, start, sums.shape[1]):
            sums[:, columns] += _sums(block, "rk,rk->k")
    return sums


def _by_columns(x: Floats, start: int, columns: int) -> Iterator[tuple[Floats, slice]]:
    """Cut a slice `[2, N]` of a flattened matrix into blocks `[2, R, W]` of whole lines or parts of one.

    Args:
        x: the slice; the blocks are views of it.
        start: its first element.
        columns: of the matrix.

    Yields:
        a block and its columns.
    """
    here = 0
    while here < x.shape[1]:
        first, left = (start + here) % columns, x.shape[1] - here
        whole = first == 0 and left >= columns
        size = left // columns * columns if whole else min(left, columns - first)
        width = columns if whole else size
        yield x[:, here : here + size].reshape(2, -1, width), slice(first, first + width)
        here += size
