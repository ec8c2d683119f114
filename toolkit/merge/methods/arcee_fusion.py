"""Take from another model the elements whose change is important, and the rest from the base.

The importance of an element is `|theta_1 - theta_0| * KL(softmax(row of theta_1) || softmax(row of theta_0))`, with
`EPS` added to all probabilities; a row is the last dimension. Elements are taken where it is at least
`median + 1.5 * (upper quartile - lower quartile)` of the tensor's. The quartiles are elements: those at
`floor(q (n - 1))` in ascending order of all `n`, where mergekit sorts a random sample of the larger tensors.

Arcee AI's, known from mergekit. A row of one element has divergence 0; where all importances are 0, and so is the
threshold, everything is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import MethodParams, TensorStream
from toolkit.merge.selection import order_statistics

TAKES = "weights"
MODELS = (2, 2)
BASE_FIRST = True
SCOPE = "row"

EPS = 1e-8
"""Added to every probability."""


class Params(MethodParams):
    """`arcee_fusion` has no parameters."""


@dataclass(frozen=True)
class State:
    """What must be known of the whole tensor.

    Attributes:
        divergences: of each row, float32; 4 bytes per row are all the memory that grows with the tensor.
        threshold: importance from which an element is taken.
    """

    divergences: Floats
    threshold: np.float32


def prepare(tensor: TensorStream, params: Params) -> State:
    """Find the divergence of every row, and the threshold."""
    width = tensor.shape[-1] if tensor.shape else 1
    divergences = np.full(tensor.count // width, np.nan, np.float32)

    def read(every: int = 1, begin: int = 0) -> Iterator[tuple[int, Floats]]:
        for start, x in tensor.stacked(every, begin):
            base, other = rows = x.reshape(2, -1, width)
            here = divergences[start // width :][: rows.shape[1]]
            if np.isnan(here[0]):  # the first time
                np.copyto(here, _divergence(other, base))
            yield start, _importance(other, base, here).reshape(1, -1)

    last = tensor.count - 1
    lower, median, upper = order_statistics(read, [last // 4, last // 2, 3 * last // 4])
    return State(divergences, np.float32(median + 1.5 * (upper - lower)))


def combine(x: Floats, params: Params, state: State, start: int) -> Floats:
    """Merge some rows `[2, R, K]`."""
    base, other = x
    first = start // x.shape[2]
    divergences = state.divergences[first : first + x.shape[1]]
    return np.where(_importance(other, base, divergences) >= state.threshold, other, base)


def _importance(other: Floats, base: Floats, divergences: Floats) -> Floats:
    """Return `|other - base|` `[R, K]` times the divergences `[R]`."""
    change = np.subtract(other, base)
    np.abs(change, out=change)
    return np.multiply(change, divergences[:, None], out=change)


def _divergence(other: Floats, base: Floats) -> NDArray[np.float64]:
    """Return the Kullback-Leibler divergence of each row, `[R]`.

    In float64: it is of second order in a small change, while its terms are of first order and cancel.
    """
    p, q = _softmax(other), _softmax(base)
    np.log(np.divide(p, q, out=q), out=q)
    # Rounding makes equal rows differ by -0 or less.
    return np.maximum(np.multiply(p, q, out=q).sum(axis=1), 0)


def _softmax(rows: Floats) -> NDArray[np.float64]:
    """Return `softmax(rows) + EPS` `[R, K]` in float64."""
    found = rows.astype(np.float64)
    found -= found.max(axis=1, keepdims=True)
    np.exp(found, out=found)
    found /= found.sum(axis=1, keepdims=True)
    found += EPS
    return found
