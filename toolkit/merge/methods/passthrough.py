"""Copy one model, its tensors multiplied by `scale`: layers for a stack of slices, or a model to be changed in part.

`scale * theta`. Stacks of slices made so, as of mergekit's passthrough, are known as frankenmerges.
"""

from __future__ import annotations

import numpy as np

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import MethodParams

TAKES = "weights"
MODELS = (1, 1)
USES_ALL = True


class Params(MethodParams):
    """Parameters of `passthrough`.

    Attributes:
        scale: of the weights.
    """

    scale: tuple[float, ...] = (1.0,)


def combine(x: Floats, params: Params, state: None, start: int) -> Floats:
    """Scale one chunk `[1, N]`."""
    return np.multiply(x[0], np.float32(params.scale[0]), out=x[0])


def coefficients(params: Params, state: object = None) -> list[float] | None:
    """Return the factor of the delta; another scale than 1 scales the base as well."""
    return [1.0] if idempotent(params) else None


def idempotent(params: Params) -> bool:
    """Tell whether the model is given unchanged."""
    return params.scale == (1.0,)
