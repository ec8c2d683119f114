"""Interpolate between the base and the average of its fine-tunes, by the angle between them.

For `k` deltas with mean pairwise cosine `c`, `t = k c / (1 + (k - 1) c)` of their average is added to the base: all of
it where they agree, nothing where they are orthogonal. A zero delta counts as orthogonal to all. The formula is kept
for negative `c`, where `t` is negative; at its pole `c = -1 / (k - 1)`, where the directions cancel, `t` is 0.

Jang et al., "Model Stock: All we need is just a few fine-tuned models", 2024 (arXiv:2403.19522).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import MethodParams, TensorStream
from toolkit.merge.ops import cosines, gram, weighted_sum

TAKES = "deltas"
MODELS = (2, None)
USES_ALL = True
SCOPE = "row"

POLE = 1e-6
"""Denominator of `t` up to which the directions cancel."""


class Params(MethodParams):
    """Parameters of `model_stock`.

    Attributes:
        filter_wise: find `t` for every row, that is the last dimension, instead of for the whole tensor.
    """

    filter_wise: bool = False


def prepare(tensor: TensorStream, params: Params) -> list[float] | None:
    """Return the factor of each delta of the whole tensor, `None` where every row has its own."""
    if params.filter_wise:
        return None
    return [float(_ratio(gram(tensor))) / tensor.num_models] * tensor.num_models


def combine(x: Floats, params: Params, state: list[float] | None, start: int) -> Floats:
    """Merge some rows of deltas `[M, R, K]`."""
    if state is not None:
        return weighted_sum(x, state)
    ratio = _ratio(_gram_of_rows(x))
    total = weighted_sum(x, [1.0] * len(x))
    return np.multiply(total, (ratio / len(x)).astype(np.float32)[..., None], out=total)


def coefficients(params: Params, state: list[float] | None) -> list[float] | None:
    """Return the factor of each model's delta; rows have no common one."""
    return state


def _ratio(products: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return `t` `[...]` from the inner products of the deltas `[..., M, M]`."""
    models = products.shape[-1]
    _, cosine = cosines(products)
    pairs = cosine.sum(axis=(-2, -1)) - np.trace(cosine, axis1=-2, axis2=-1)
    mean = np.asarray(pairs / (models * (models - 1)))
    below = 1 + (models - 1) * mean
    return np.divide(models * mean, below, out=np.zeros_like(mean), where=below > POLE)


def _gram_of_rows(x: Floats) -> NDArray[np.float64]:
    """Return the inner products of all pairs of models, row by row: `[M, R, K]` to `[R, M, M]` in float64."""
    wide = x.astype(np.float64)
    return np.einsum("irk,jrk->rij", wide, wide)
