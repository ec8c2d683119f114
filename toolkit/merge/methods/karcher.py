"""Mean of several models along the arcs of the sphere.

The Karcher mean of the directions `u_i = v_i / |v_i|` is the `m` on the sphere with the smallest
`sum_i w_i angle(m, u_i)^2`; the result is `(sum_i w_i |v_i|) * m`, with weights that sum to 1. It is found by steps
`m <- exp_m(sum_i w_i log_m(u_i))` from the normalized mean of the `u_i`. Every `m` is a weighted sum of the inputs, so
the steps are taken on its `M` coefficients and cost nothing.

Karcher, "Riemannian center of mass and mollifier smoothing", 1977; for model weights as mergekit applies it
(arXiv:2603.04972), where all weights are equal and a base is one more model. A zero tensor has no direction and counts
for the norm only. Where the directions cancel, no direction is their mean, and the result is the straight mean
`sum_i w_i v_i`; a model opposite to `m` is equally far on all sides and does not pull.
"""

from __future__ import annotations

from math import cos, sin, sqrt
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import MethodParams, TensorStream
from toolkit.merge.ops import cosines, gram, weighted_sum

TAKES = "weights"
MODELS = (1, None)
USES_ALL = True
BASE_JOINS = True

CANCELLED = 1e-6
"""Length of the mean of unit vectors, and sine of an angle, that float32 cannot tell from 0."""


class Params(MethodParams):
    """Parameters of `karcher`.

    Attributes:
        weight: of each model; they are divided by their sum.
        max_iter: steps at most.
        tol: length of a step, in radians, at which they end.
    """

    weight: tuple[Annotated[float, Field(ge=0)], ...] = (1.0,)
    max_iter: int = Field(100, ge=0)
    tol: float = Field(1e-7, ge=0)

    @model_validator(mode="after")
    def _has_weight(self) -> Params:
        if not sum(self.weight):
            raise ValueError("all weights are 0")
        return self


def prepare(tensor: TensorStream, params: Params) -> list[float]:
    """Return the factor of each model, from the inner products of all pairs."""
    weights = np.array(params.weight) / sum(params.weight)
    norms, cosine = cosines(gram(tensor))
    pulls = weights * (norms > 0)
    if sqrt(max(0.0, float(pulls @ cosine @ pulls))) <= CANCELLED:
        return weights.tolist()
    mean = _mean(pulls / pulls.sum(), cosine, params)
    norm = float(weights @ norms)
    return np.divide(norm * mean, norms, out=np.zeros_like(norms), where=norms > 0).tolist()


def combine(x: Floats, params: Params, state: list[float], start: int) -> Floats:
    """Add one chunk `[M, N]`."""
    return weighted_sum(x, state)


def _mean(weights: NDArray[np.float64], cosine: NDArray[np.float64], params: Params) -> NDArray[np.float64]:
    """Return the Karcher mean of unit vectors, as coefficients `[M]` of them; `cosine` `[M, M]` is of their pairs."""

    def length(coefficients: NDArray[np.float64]) -> float:
        return sqrt(max(0.0, float(coefficients @ cosine @ coefficients)))

    mean = weights / length(weights)
    for _ in range(params.max_iter):
        to_each = np.clip(cosine @ mean, -1.0, 1.0)
        angle, sine = np.arccos(to_each), np.sqrt(1 - np.square(to_each))
        pull = weights * np.divide(angle, sine, out=np.ones_like(sine), where=sine > CANCELLED)
        tangent = pull - (pull @ to_each) * mean
        step = length(tangent)
        if step <= params.tol:
            break
        mean = cos(step) * mean + sin(step) / step * tangent
        mean /= length(mean)
    return mean
