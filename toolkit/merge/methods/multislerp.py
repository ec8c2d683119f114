"""Spherical average of several models, or of their deltas where there is a base, in one step.

With unit vectors `u_i = v_i / |v_i|` and their weighted mean `m = sum_i w_i u_i`, the result is
`(sum_i w_i |v_i|) * m / |m|`: the mean direction with the mean norm. Goddard, "Multi-SLERP"
(goddard.blog/posts/multislerp-wow-what-a-cool-idea), goes on to add the projections of the `u_i` onto the tangent
space at `m / |m|` and maps their sum back to the sphere; that sum is the projection of `m`, which is 0 whatever the
weights, so nothing is left of the step. `karcher` goes on from here to the mean along arcs.

Where the directions cancel there is no mean direction, and the result is the straight mean `sum_i w_i v_i`.
"""

from __future__ import annotations

from math import sqrt

import numpy as np
from pydantic import Field, model_validator

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import MethodParams, TensorStream
from toolkit.merge.ops import cosines, gram, weighted_sum

TAKES = "either"
MODELS = (1, None)
USES_ALL = True

CANCELLED = 1e-6
"""Length of the mean of unit vectors that float32 cannot tell from 0."""


class Params(MethodParams):
    """Parameters of `multislerp`.

    Attributes:
        weight: of each model.
        normalize_weights: divide them by their sum.
        eps: length of the mean of the unit vectors up to which the directions cancel; at least `CANCELLED`.
            It is not added to the norms, so small deltas keep their size.
    """

    weight: tuple[float, ...]
    normalize_weights: bool = True
    eps: float = Field(1e-8, ge=0)

    @model_validator(mode="after")
    def _can_normalize(self) -> Params:
        if self.normalize_weights and not sum(self.weight):
            raise ValueError("the weights sum to 0, which cannot be normalized")
        return self


def prepare(tensor: TensorStream, params: Params) -> list[float]:
    """Return the factor of each model, from the inner products of all pairs."""
    weights = np.array(params.weight) / (sum(params.weight) if params.normalize_weights else 1.0)
    norms, cosine = cosines(gram(tensor))
    length = sqrt(max(0.0, float(weights @ cosine @ weights)))
    if length <= max(params.eps, CANCELLED):
        return weights.tolist()
    norm = float(weights @ norms)
    return np.divide(norm * weights / length, norms, out=np.zeros_like(norms), where=norms > 0).tolist()


def coefficients(params: Params, state: list[float]) -> list[float]:
    """Return the factor of each model's delta."""
    return state


def combine(x: Floats, params: Params, state: list[float], start: int) -> Floats:
    """Add one chunk `[M, N]`."""
    return weighted_sum(x, state)


def idempotent(params: Params) -> bool:
    """Tell whether equal models give that model."""
    return params.normalize_weights or sum(params.weight) == 1
